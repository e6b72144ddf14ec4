"""Gradients of a convolution as convolutions, for toolchains that know no ``convolution_backward``.

Position p of a result reads position ``p * stride + k * dilation - padding`` through tap k.  So the
gradient by the argument is a transposed convolution of the result's; that by the weight is a
convolution of the argument by the result's gradient, where stride and dilation have changed places.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxpath.graph.aten import CONVOLUTION


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, None]:
    """``aten.convolution_backward`` by ``aten.convolution``, for convolutions without bias."""
    spec = list(stride), list(padding), list(dilation)
    zeros = [0] * len(spec[0])
    for_x = for_weight = None
    if output_mask[0] and transposed:
        for_x = CONVOLUTION(grad, weight, None, *spec, False, zeros, groups)
        for_x = _cropped(for_x, x.shape)
    elif output_mask[0]:
        missing = [
            n - ((p - 1) * s - 2 * pad + d * (k - 1) + 1)
            for n, p, k, s, pad, d in zip(
                x.shape[2:], grad.shape[2:], weight.shape[2:], *spec, strict=True
            )
        ]
        for_x = CONVOLUTION(grad, weight, None, *spec, True, missing, groups)
    if output_mask[1]:
        # Of a transposed one, argument and result have changed places.
        read, written = (grad, x) if transposed else (x, grad)
        split = read.reshape(len(read), groups, read.shape[1] // groups, *read.shape[2:])
        by_input = split.permute(2, 1, 0, *range(3, split.dim()))
        by_input = by_input.reshape(by_input.shape[0], -1, *read.shape[2:])
        made = CONVOLUTION(
            by_input, written.transpose(0, 1), None, spec[2], spec[1], spec[0], False, zeros, groups
        )
        for_weight = _cropped(made.transpose(0, 1), weight.shape)
    return for_x, for_weight, None


def _cropped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Without positions that a rounded down size has left over."""
    for dim in range(2, x.dim()):
        if x.shape[dim] != shape[dim]:
            x = x.narrow(dim, 0, shape[dim])
    return x
