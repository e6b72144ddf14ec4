"""Quantized weights together with a certificate of what the quantization can change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.graph import ops
from fxpath.graph.schema import arguments, target
from fxpath.model import Captured, Given, Shapes, check_finite, named_tensors
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.bounds import Bound, lipschitz_bound
from fxpath.pairs.metric import PathMetric, path_metric
from fxpath.passes import take_in


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rounded weights of a model.

    Attributes:
        state_dict: all of the model's entries; those that are not rounded are copies.
        steps: name of a rounded tensor -> distance of two neighbours on its grid, float64, of a
            shape that broadcasts to the tensor's; entries are integers times it, exactly.
        certificate: for rounding towards zero the exact :class:`fxpath.PathMetric` to the model;
            for rounding to nearest the :class:`fxpath.Bound` of how far the two functions are
            apart where ``||x||_inf <= 1``.
    """

    state_dict: dict[str, Tensor]
    steps: dict[str, Tensor]
    certificate: PathMetric | Bound

    def __repr__(self) -> str:
        return f"<Quantized: {len(self.steps)} tensors rounded, {self.certificate!r}>"


@plain_mode()
@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: int,
    *,
    rounding: str = "zero",
    per_channel: bool = False,
    input_shape: Shapes = None,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> Quantized:
    """Round weights and biases to signed integers of some bits times a step.

    A tensor with largest entry M has the grid ``step * {-L, ..., L}`` with ``L = 2^(bits-1) - 1``
    and ``step`` at least M / L, made so that each value is a number of the tensor's own format.

    What enters Phi as it is gets rounded: weights, also those in front of a batch norm, and biases
    that no batch norm follows.  Scales, biases and statistics of batch norms stay, and biases in
    front of one: rounding them towards zero can enlarge the effective bias
    beta + gamma (b - mu) / sigma.

    Rounding towards zero keeps all signs and enlarges nothing, so that the path-metric is exact by
    (7); the functions differ by at most ``max(||x||_inf, 1)`` times it (Theorem 3.1).  Rounding to
    nearest has smaller errors of either sign, for which only bounds are known.

    Args:
        model: a module, in either mode; it is not changed.
        bits: of an integer with its sign, at least 2.
        rounding: ``"zero"`` or ``"nearest"``.
        per_channel: whether each output channel of a weight has a step of its own; biases, and
            parameters with one axis, have one step each.
        input_shape: as for :func:`fxpath.analyze`.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.

    Returns:
        A :class:`Quantized`.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for ``bits`` below 2 or beyond a parameter's number format, another
            ``rounding``, a NaN or infinite parameter, a weight that is computed (pruned,
            parametrized), by name.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.9, 0.5]]))
        >>> quantized = quantize(model, 3)
        >>> quantized.state_dict["weight"]
        tensor([[ 3., -1.,  0.]])
        >>> quantized.certificate.exact, round(quantized.certificate.value, 6)
        (True, 1.4)
        >>> nearest = quantize(model, 3, rounding="nearest")
        >>> nearest.state_dict["weight"], round(float(nearest.certificate), 6)
        (tensor([[ 3., -2.,  0.]]), 0.6)
    """
    if bits < 2:
        raise ValueError(f"bits={bits}: a sign and at least one more")
    if rounding not in ("zero", "nearest"):
        raise ValueError(f'rounding={rounding!r}: pass "zero" or "nearest"')
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    captured, lifted = take_in(model, given)
    live = captured.live()
    check_finite({captured.tensors[key]: tensor for key, tensor in live.items()})
    steps: dict[str, Tensor] = {}
    rounded: dict[int, Tensor] = {}
    for placeholder, axis in _rounded_as_they_are(captured, lifted).items():
        tensor, name = live[placeholder].detach(), captured.tensors[placeholder]
        axes = [d for d in range(tensor.dim()) if d != axis] if per_channel else []
        steps[name], rounded[id(live[placeholder])] = _round(name, tensor, bits, rounding, axes)
    # Tied weights are one tensor under several names; each name gets a tensor of its own.
    named, taken = named_tensors(model), set[int]()
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        own = id(named.get(name))
        first = own in rounded and own not in taken
        state[name] = rounded[own] if first else rounded.get(own, value.detach()).clone()
        taken.add(own)
    certify = path_metric if rounding == "zero" else lipschitz_bound
    return Quantized(state, steps, certify(model, state, **given.told()))


def _rounded_as_they_are(captured: Captured, lifted: fx.GraphModule) -> dict[str, int]:
    """Parameters that enter Phi by factors of their own: placeholder -> axis of its channels."""
    found: dict[str, int] = {}
    computed: list[str] = []
    for node in lifted.graph.nodes:
        if node.target is not ops.coordinate:
            continue
        value, name = arguments(node)
        if value.target in (ops.normalizer, ops.folded_bias):
            continue
        own = arguments(value)[0] if value.target is ops.folded_weight else value
        if own.op != "placeholder":
            computed.append(name)
            continue
        transposed = any(u.target is ops.conv and arguments(u)[6] for u in node.users)
        found[own.target] = 1 if transposed else 0
    if computed:
        raise ValueError(
            f"{', '.join(computed)}: computed from other parameters; make them parameters first "
            "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
        )
    # A parameter that a batch norm, or anything else, reads as well is left alone.
    plain = {ops.coordinate, ops.folded_weight}
    users = {n.target: {target(u) for u in n.users} for n in lifted.graph.nodes}
    return {name: axis for name, axis in found.items() if users[name] <= plain}


def _round(
    name: str, tensor: Tensor, bits: int, rounding: str, axes: list[int]
) -> tuple[Tensor, Tensor]:
    """Step and rounded tensor; one step for all entries along ``axes``, or for all without axes."""
    levels = 2 ** (bits - 1) - 1
    digits = 1 - round(math.log2(torch.finfo(tensor.dtype).eps))
    if bits > digits:
        raise ValueError(f"{name}: {tensor.dtype} has {digits} binary digits, too few for {bits}")
    if axes and tensor.dim() > 1:
        largest = tensor.abs().amax(axes, keepdim=True).double()
    else:
        largest = tensor.abs().amax().double().reshape([1] * tensor.dim())
    # Rounded up to few binary digits, so that its multiples are numbers of the tensor's format.
    mantissa, exponent = torch.frexp(largest / levels)
    fine = 2.0 ** (digits - bits + 1)
    step = torch.ldexp(torch.ceil(mantissa * fine) / fine, exponent)
    step = torch.where(largest > 0, step, torch.ones_like(step))
    result = torch.empty_like(tensor)
    rows = max(1, BLOCK * len(tensor) // max(1, tensor.numel())) if tensor.dim() else 1
    steps = step.expand(len(tensor), *step.shape[1:]) if tensor.dim() else step
    pieces = [(tensor, steps, result)]
    if tensor.dim():
        pieces = list(zip(*(t.split(rows) for t in (tensor, steps, result)), strict=True))
    for piece, unit, out in pieces:
        out.copy_(_on_grid(piece.double(), unit, rounding))
    return step, result


#: Entries of a tensor that are rounded at once: there are some copies of them in float64.
BLOCK = 1 << 20


def _on_grid(exact: Tensor, step: Tensor, rounding: str) -> Tensor:
    size = exact.abs()
    level = size / step
    if rounding == "nearest":
        level.round_()
    else:
        level.floor_()
        # A quotient just below an integer may have been rounded up to it.
        level.sub_((level * step > size).to(level.dtype))
    return level.copysign_(exact).mul_(step)
