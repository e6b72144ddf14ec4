"""What one operation does to path mass, found by calling it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


Values = tuple[Tensor, ...]


_LARGE = 1e30  # beyond every bound of a clamp


_ZERO = 1e-13  # a coefficient below this is the rounding of f(e_i) - f(0), for q = 0


# ---------------------------------------------------------------------- operations as modules
class Call(nn.Module):
    """A function of tensors as a module; named shapes become parameters, named tensors buffers."""

    def __init__(self, function: Callable[..., Any], **named: Shape | Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(named)
        for name, value in named.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(value)))

    def forward(self, *inputs: Tensor) -> Any:
        """Call the function on the inputs and the named tensors."""
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


# --------------------------------------------------------------------------- lifting one step
def power(tensor: Tensor, q: float) -> Tensor:
    """``|tensor|^q`` with 0^0 = 0: the number of non-zero paths has no zero edges."""
    return (tensor.abs() > _ZERO).to(tensor.dtype) if q == 0 else tensor.abs() ** q


class Coordinates:
    """The absolute values of a model's parameters, as leaves to differentiate with respect to."""

    def __init__(self, model: nn.Module, q: float) -> None:
        self.q = q
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.leaves: dict[str, list[Tensor]] = {}
        self.optional: set[str] = set()

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """``|value|^q``; every use is a leaf of its own, because two folded biases may differ."""
        leaf = value.detach().abs().clone().requires_grad_()
        self.leaves.setdefault(name, []).append(leaf)
        return power(leaf, self.q)

    def of(self, parameter: Tensor) -> Tensor:
        """``|parameter|^q`` under the parameter's own name."""
        return self(self.names[id(parameter)], parameter)

    def name(self, module: nn.Module, path: str, prefix: str) -> str:
        """The name of ``module.path`` in the whole model, also where that is None."""
        parent, _, leaf = path.rpartition(".")
        parameter = getattr(module.get_submodule(parent), leaf, None)
        return self.names.get(id(parameter), f"{prefix}.{path}")


Rule = Callable[[nn.Module, str, Coordinates, Values], list[Tensor]]


@dataclass(frozen=True)
class Step:
    """An operation, how its effect is measured, and which earlier values it reads (all: None)."""

    module: nn.Module
    rule: Rule
    reads: tuple[int, ...] | None = None


def _apply(module: nn.Module, values: Sequence[Tensor], overrides: dict[str, Tensor]) -> Values:
    """Outputs for a batch of inputs; clones, because the operation may work in place."""
    with torch.no_grad():
        inputs = tuple(value.clone() for value in values)
        return as_tuple(torch.func.functional_call(module, overrides, inputs))


def _unit_batches(shapes: Sequence[Shape], low: float, high: float) -> list[Tensor]:
    """One row ``low`` throughout, then one row per entry of the inputs where that is ``high``."""
    total = sum(map(math.prod, shapes))
    rows = torch.full((total + 1, total), low, dtype=torch.float64)
    rows[1:].fill_diagonal_(high)
    parts = rows.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def _rows(
    module: nn.Module, batches: list[Tensor], overrides: dict[str, Tensor], single: bool
) -> tuple[Tensor, Values]:
    """The outputs, flattened and side by side: one row per row of the batches."""
    if single:  # an operation that is only right for a batch of one
        runs = [
            _apply(module, [batch[k : k + 1] for batch in batches], overrides)
            for k in range(len(batches[0]))
        ]
        outputs = tuple(torch.cat([run[k] for run in runs]) for k in range(len(runs[0])))
    else:
        outputs = _apply(module, batches, overrides)
    return torch.cat([y.reshape(len(batches[0]), -1) for y in outputs], 1), outputs


@functools.lru_cache(maxsize=4)
def _measure(
    module: nn.Module, shapes: tuple[Shape, ...], names: tuple[str, ...], single: bool
) -> tuple[Tensor, Tensor, dict[str, Values], list[Shape]]:
    """Jacobian and constant with the named parameters 0, and what each of their entries adds."""
    parameters = dict(module.named_parameters())
    zero = {name: torch.zeros_like(parameters[name]) for name in names}
    units = _unit_batches(shapes, 0.0, 1.0)

    def jacobian(overrides: dict[str, Tensor]) -> tuple[Tensor, Tensor, Values]:
        rows, outputs = _rows(module, units, overrides, single)
        return (rows[1:] - rows[0]).T, rows[0], outputs

    matrix, constant, outputs = jacobian(zero)
    taps = {}
    for name in names:
        added = []
        for entry in range(parameters[name].numel()):
            unit = zero[name].flatten().clone()
            unit[entry] = 1.0
            j, c, _ = jacobian({**zero, name: unit.reshape(parameters[name].shape)})
            added.append((j - matrix, c - constant))
        taps[name] = tuple(torch.stack(part) for part in zip(*added, strict=True))
    return matrix, constant, taps, [tuple(y.shape[1:]) for y in outputs]


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def _unflat(vector: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    parts = vector.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _lift_affine(
    module: nn.Module,
    prefix: str,
    coordinates: Coordinates,
    values: Values,
    names: tuple[str, ...] | None = None,
    folded_bias: str | None = None,
    single: bool = False,
) -> list[Tensor]:
    if names is None:
        names = tuple(name for name, _ in module.named_parameters())
    shapes = tuple(tuple(value.shape) for value in values)
    matrix, constant, taps, out_shapes = _measure(module, shapes, names, single)
    q, mass = coordinates.q, flat(values)
    if folded_bias is None:
        total = power(constant, q)
    else:  # one effective bias per channel, credited to one name
        full = constant.reshape(out_shapes[0])
        channel = (-1, *[1] * (full.ndim - 1))
        bias = full.flatten(1)[:, 0] if full.ndim > 1 else full
        torch.testing.assert_close(full, bias.view(channel).expand_as(full))
        name = coordinates.name(module, folded_bias, prefix)
        total = coordinates(name, bias).view(channel).expand_as(full).reshape(-1)
    total = total + power(matrix, q) @ mass
    parameters = dict(module.named_parameters())
    for name in names:
        tap_matrices, tap_constants = (power(part, q) for part in taps[name])
        total = total + (tap_matrices @ mass + tap_constants).T @ coordinates.of(
            parameters[name]
        ).reshape(-1)
    return _unflat(total, out_shapes)


def affine(op: Callable[..., Any], reads: tuple[int, ...] | None = None, **options: Any) -> Step:
    """An operation that is affine in its inputs and its parameters taken together.

    Options: ``names`` of the parameters that are coordinates (all by default, the others are kept
    at their values); ``folded_bias``: the name that owns the constant per channel; ``single``: run
    with batches of one.
    """
    return Step(_module(op), functools.partial(_lift_affine, **options), reads)


def batch_norm(op: Callable[..., Any], reads: tuple[int, ...] | None = None) -> Step:
    """A batch norm that stays its own neuron: one edge and one bias per channel."""

    def lift(
        module: nn.Module, prefix: str, coordinates: Coordinates, values: Values
    ) -> list[Tensor]:
        (mass,) = values
        bias, slope = (_apply(module, [torch.full_like(mass, x)[None]], {})[0][0] for x in (0, 1))
        slope = slope - bias
        channel = (-1, *[1] * (mass.ndim - 1))
        names = {leaf: coordinates.name(module, leaf, prefix) for leaf in ("weight", "bias")}
        # Without a weight of its own the edge is 1/sigma: it may or may not be listed.
        if getattr(module, "weight", None) is None:
            coordinates.optional.add(names["weight"])
        edge = coordinates(names["weight"], slope.reshape(len(slope), -1)[:, 0])
        start = coordinates(names["bias"], bias.reshape(len(bias), -1)[:, 0])
        return [mass * edge.view(channel) + start.view(channel)]

    return Step(_module(op), lift, reads)


def quotient(op: Call, reads: tuple[int, ...] | None = None) -> Step:
    """``x / weight``: the coordinate is the number that is multiplied with, 1 / weight."""

    def lift(
        module: nn.Module, prefix: str, coordinates: Coordinates, values: Values
    ) -> list[Tensor]:
        weight = module.weight
        return [values[0] * coordinates(coordinates.names[id(weight)], 1 / weight)]

    return Step(op, lift, reads)


def homogeneous(op: Callable[..., Any], reads: tuple[int, ...] | None = None) -> Step:
    """Entry by entry, x -> p x for x > 0 and n x for x < 0: mass times max(|p|, |n|)^q."""

    def lift(
        module: nn.Module, prefix: str, coordinates: Coordinates, values: Values
    ) -> list[Tensor]:
        (mass,) = values
        up, down = (_apply(module, [torch.full_like(mass, x)[None]], {})[0][0] for x in (1, -1))
        return [mass * power(torch.maximum(up.abs(), down.abs()), coordinates.q)]

    return Step(_module(op), lift, reads)


def clamp(op: Callable[..., Any], reads: tuple[int, ...] | None = None) -> Step:
    """Entry by entry, between a lower and an upper bound if there are such."""

    def lift(
        module: nn.Module, prefix: str, coordinates: Coordinates, values: Values
    ) -> list[Tensor]:
        (mass,) = values
        for x in (_LARGE, -_LARGE):
            bound = _apply(module, [torch.full_like(mass, x)[None]], {})[0][0]
            mass = mass + power(torch.where(bound == x, 0.0, bound), coordinates.q)
        return [mass]

    return Step(_module(op), lift, reads)


def _extremum(op: Callable[..., Any], sign: float, reads: tuple[int, ...] | None) -> Step:
    def lift(
        module: nn.Module, prefix: str, coordinates: Coordinates, values: Values
    ) -> list[Tensor]:
        shapes = tuple(tuple(value.shape) for value in values)
        rows, outputs = _rows(module, _unit_batches(shapes, -sign, sign), {}, single=False)
        membership = (rows[1:] == sign).T.to(torch.float64)
        return _unflat(membership @ flat(values), [tuple(y.shape[1:]) for y in outputs])

    return Step(_module(op), lift, reads)


def maximum(op: Callable[..., Any], reads: tuple[int, ...] | None = None) -> Step:
    """Every output is the maximum of some entries of the inputs."""
    return _extremum(op, 1.0, reads)


def minimum(op: Callable[..., Any], reads: tuple[int, ...] | None = None) -> Step:
    """Every output is the minimum of some entries of the inputs."""
    return _extremum(op, -1.0, reads)


def ranks(op: Callable[..., Any], reads: tuple[int, ...] | None = None) -> Step:
    """Every output is the entry of some rank among some entries: those that it is ever equal to."""

    def lift(
        module: nn.Module, prefix: str, coordinates: Coordinates, values: Values
    ) -> list[Tensor]:
        sizes = [value.numel() for value in values]
        generator, total = torch.Generator().manual_seed(0), sum(sizes)
        rows = torch.stack([torch.randperm(total, generator=generator) for _ in range(400)])
        batches = [
            part.double().reshape(-1, *value.shape)
            for part, value in zip(rows.split(sizes, 1), values, strict=True)
        ]
        found, outputs = _rows(module, batches, {}, single=False)
        # Where each output's number stood among the inputs of its row.
        place = rows.argsort(1).gather(1, found.long())
        membership = torch.zeros(found.shape[1], total, dtype=torch.float64)
        for row in place:
            membership[torch.arange(len(row)), row] = 1.0
        return _unflat(membership @ flat(values), [tuple(y.shape[1:]) for y in outputs])

    return Step(_module(op), lift, reads)


def _module(op: Callable[..., Any]) -> nn.Module:
    return op if isinstance(op, nn.Module) else Call(op)
