"""The baseline: Path-Mag as published.

Written from Appendix E of the paper: on a deep copy, max-pooling layers become convolutions with
weights 1, weights become absolute values, a forward pass on ones gives the path-norm, a backward
pass its gradient, and the product with the weights is Path-Mag.  Dropping the copy restores the
model.

It is as general as its description.  Only layers `nn.MaxPool2d` are replaced; of a batch
normalization the affine parameters become absolute and the running statistics stay, which is right
for the statistics of a freshly built model (mean 0) and for few others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Recipe", "recipe"]


@dataclass(frozen=True)
class Recipe:
    """Path-norm, and absolute Path-Mag by parameter name."""

    path_norm: float
    scores: dict[str, Tensor]


def recipe(model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Recipe:
    """Run the published recipe.

    Args:
        model: a module; it is not changed.
        shape: of one input sample.
        dtype: number format of the copy.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]])), layer.bias.data.fill_(-1.0)
        >>> result = recipe(layer, (2,))
        >>> result.path_norm, result.scores["weight"].tolist()
        (8.0, [[3.0, 4.0]])
    """
    copied = copy.deepcopy(model).to(dtype).eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.MaxPool2d):
            copied.set_submodule(name, SumPool2d(module))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.requires_grad_().abs_()
    device = next((p.device for p in copied.parameters()), None)
    total = copied(torch.ones(1, *shape, dtype=dtype, device=device)).sum()
    total.backward()
    scores = {
        name: parameter.grad * parameter.detach()
        for name, parameter in copied.named_parameters()
        if parameter.grad is not None
    }
    return Recipe(total.item(), scores)


class SumPool2d(nn.Module):
    """A max-pooling layer with sums for maxima: a depthwise convolution with weights 1."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel, self.stride = _pair(pool.kernel_size), _pair(pool.stride)
        self.padding, self.dilation = _pair(pool.padding), _pair(pool.dilation)
        self.ceil_mode = pool.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]``, as the max-pooling."""
        if self.ceil_mode:
            x = functional.pad(x, (0, self._missing(x, 1), 0, self._missing(x, 0)))
        channels = x.shape[1]
        ones = x.new_ones(channels, 1, *self.kernel)
        return functional.conv2d(
            x, ones, None, self.stride, self.padding, self.dilation, groups=channels
        )

    def _missing(self, x: Tensor, axis: int) -> int:
        """Rows (or columns) that the last window lacks at the far border."""
        stride, padding = self.stride[axis], self.padding[axis]
        length, span = x.shape[2 + axis], self.dilation[axis] * (self.kernel[axis] - 1) + 1
        windows = -(-(length + 2 * padding - span) // stride) + 1
        # As in max-pooling, the last window must not start beyond the border.
        if (windows - 1) * stride >= length + padding:
            windows -= 1
        return max(0, (windows - 1) * stride + span - length - 2 * padding)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
