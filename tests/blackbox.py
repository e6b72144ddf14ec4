"""A dense oracle for the path-norm of one operation, that only ever *calls* the operation.

An operation is sandwiched between two layers with random weights and biases, so that a value that
ends up at a wrong position shows. What the operation does to path mass is found by experiment:

* affine in its input and in its parameters: with all parameters zero but one entry, the Jacobian
  says which input reaches which output through that entry. A map without parameters has
  coefficients only. With ``|.|^q`` applied entrywise, mass is carried by these matrices.
* maximum of some entries: output j belongs to input i if it rises when only ``x_i`` does.
* positively homogeneous, entry by entry (ReLU, abs, PReLU, dropout): max(|f(1)|, |f(-1)|).
* clamp: mass plus ``|f(-big)|^q + |f(big)|^q`` where these are bounds.

Nothing here knows strides, paddings, windows or axes, and nothing is shared with the package.
Values have no batch axis: a step maps a tuple of tensors to a tuple of tensors.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath

Shape = tuple[int, ...]
Values = tuple[Tensor, ...]

RTOL = 1e-10
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


class Dag(nn.Module):
    """Steps that read the previous step's outputs, or the values numbered by ``reads``."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(step.module for step in steps)
        self.steps = tuple(steps)

    def run(self, values: Sequence[Any], apply: Callable[[int, Any], Any]) -> list[Any]:
        """Thread values through the steps: ``apply(k, arguments)`` gives step k's outputs."""
        env, last = list(values), range(len(values))
        for number, step in enumerate(self.steps):
            outputs = apply(number, [env[k] for k in (step.reads or last)])
            last = range(len(env), len(env) + len(outputs))
            env += outputs
        return [env[k] for k in last]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Run the network itself."""
        return self.run(inputs, lambda k, arguments: _tuple(self.parts[k](*arguments)))


class Sandwich(nn.Module):
    """Random layer -> operation -> random layer, for every input and every output.

    ``dense`` mixes everything: all positions differ before and after the operation.
    ``spatial`` keeps images: borders differ from the interior, which is constant.
    ``bare`` has no layers around the operation, which then reads inputs and makes outputs.
    """

    def __init__(self, steps: Sequence[Step], shapes: Sequence[Shape], layout: str) -> None:
        super().__init__()
        self.op = Dag(copy.deepcopy(steps))
        self.layout = layout
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        if layout == "dense":
            self.input_shapes: list[Shape] = [(3,)]
            for shape in shapes:
                linear = nn.Linear(3, math.prod(shape))
                reshape = nn.Unflatten(1, shape) if len(shape) > 1 else nn.Identity()
                self.before.append(nn.Sequential(linear, reshape))
        elif layout == "spatial":
            self.input_shapes = [(2, *shape[1:]) for shape in shapes]
            self.before.extend(_convolution(2, shape[0], len(shape) - 1) for shape in shapes)
        else:
            self.input_shapes = list(shapes)
        self.double()
        randomize(self.op)
        if layout == "bare":
            return
        zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
        for output in self.op.eval()(*zeros):
            if layout == "spatial" and output.ndim == 2 + len(shapes[0]) - 1:
                self.after.append(_convolution(output.shape[1], 2, output.ndim - 2))
            else:
                linear = nn.Linear(math.prod(output.shape[1:]), 2)
                self.after.append(nn.Sequential(nn.Flatten(1), linear))
        self.double()
        randomize(self.before, seed=1)
        randomize(self.after, seed=2)

    def forward(self, *inputs: Tensor) -> Values:
        """Run the network itself: all outputs of the last layers."""
        if self.layout == "dense":
            inputs = inputs * len(self.before)
        if self.layout != "bare":
            inputs = tuple(layer(x) for layer, x in zip(self.before, inputs, strict=True))
        outputs = self.op(*inputs)
        if self.layout != "bare":
            outputs = [layer(y) for layer, y in zip(self.after, outputs, strict=True)]
        return tuple(outputs)


def _convolution(channels: int, out_channels: int, dim: int) -> nn.Module:
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1](channels, out_channels, 3, padding=1)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Random parameters and batch-norm statistics; one weight in five is zero, no bias is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = normal(parameter)
            if "weight" in name and parameter.ndim > 1:
                values *= torch.rand(values.shape, generator=generator) > 0.2
            parameter.copy_(values)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(normal(buffer).abs() + 0.5)


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
        return _tuple(torch.func.functional_call(module, overrides, inputs))


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


def _flat(values: Sequence[Tensor]) -> Tensor:
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
    q, mass = coordinates.q, _flat(values)
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
        return _unflat(membership @ _flat(values), [tuple(y.shape[1:]) for y in outputs])

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
        return _unflat(membership @ _flat(values), [tuple(y.shape[1:]) for y in outputs])

    return Step(_module(op), lift, reads)


def _module(op: Callable[..., Any]) -> nn.Module:
    return op if isinstance(op, nn.Module) else Call(op)


# ------------------------------------------------------------------------ the whole sandwich
@dataclass(frozen=True)
class Expected:
    """What an analysis has to say: ``scores`` are shares, for q = 1."""

    path_norm: float
    scores: dict[str, Tensor]
    optional: set[str] = field(default_factory=set)


def expected(model: Sandwich, q: float) -> Expected:
    """The lifted sandwich, dense and in float64, and its logarithmic derivatives."""
    model = model.eval()
    coordinates = Coordinates(model, q)
    values = [torch.ones(shape, dtype=torch.float64) for shape in model.input_shapes]
    if model.layout == "dense":
        values = values * len(model.before)
    if model.layout != "bare":
        values = [
            _lift_layer(layer, coordinates, value)
            for layer, value in zip(model.before, values, strict=True)
        ]

    def lift(number: int, arguments: list[Tensor]) -> list[Tensor]:
        module, rule = model.op.parts[number], model.op.steps[number].rule
        return rule(module, f"op.parts.{number}", coordinates, tuple(arguments))

    values = model.op.run(values, lift)
    if model.layout != "bare":
        values = [
            _lift_layer(layer, coordinates, value)
            for layer, value in zip(model.after, values, strict=True)
        ]
    total = _flat(values).sum()
    scores = {}
    # Shares of nothing are 0, not NaN.
    target = total.log() if total > 0 else total * 0
    for name, leaves in coordinates.leaves.items() if q == 1 else ():
        slopes = torch.autograd.grad(target, leaves, allow_unused=True, retain_graph=True)
        uses = [
            leaf * slope for leaf, slope in zip(leaves, slopes, strict=True) if slope is not None
        ]
        scores[name] = sum(uses, torch.zeros_like(leaves[0])).detach()
    norm = float(total.detach()) ** (1 / q if q else 1)
    return Expected(norm, scores, coordinates.optional)


def _lift_layer(layer: nn.Module, coordinates: Coordinates, mass: Tensor) -> Tensor:
    """An outer layer: linear between reshapes, or a zero-padded convolution, written out."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            is_linear = isinstance(part, nn.Linear)
            mass = _lift_layer(part, coordinates, mass) if is_linear else part(mass[None])[0]
        return mass
    weight, bias = coordinates.of(layer.weight), coordinates.of(layer.bias)
    if isinstance(layer, nn.Linear):
        return weight @ mass + bias
    convolve = [functional.conv1d, functional.conv2d, functional.conv3d][weight.ndim - 3]
    return convolve(mass[None], weight, bias, padding=1)[0]


# -------------------------------------------------------------------- cases and the comparison
@dataclass(frozen=True)
class Case:
    """An operation, or some in a row, and the shapes of what they read (no batch axis)."""

    id: str
    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    layouts: tuple[str, ...]


def case(
    name: str,
    shape: Shape | list[Shape],
    *steps: Step,
    layouts: tuple[str, ...] = (),
) -> Case:
    """A case; a bare tuple is the shape of the only input."""
    shapes = tuple(shape) if isinstance(shape, list) else (shape,)
    if not layouts:
        spatial = all(2 <= len(shape) <= 4 for shape in shapes)
        layouts = ("dense", "spatial") if spatial else ("dense",)
    return Case(name, shapes, steps, layouts)


def parameters(cases: Iterable[Case]) -> list[Any]:
    """Every case in every layout that suits it, for ``pytest.mark.parametrize``."""
    params = [
        pytest.param(item, layout, id=f"{item.id}-{layout}")
        for item in cases
        for layout in item.layouts
    ]
    names = [param.id for param in params]
    repeated = sorted({name for name in names if names.count(name) > 1})
    assert not repeated, f"cases with the same name: {repeated}"
    return params


def assert_norm(actual: float, want: Expected, q: float) -> None:
    """The path-norm itself, to the rounding of float64."""
    assert actual == pytest.approx(want.path_norm, rel=RTOL, abs=0), f"path-norm for q = {q}"


def assert_scores(actual: dict[str, Tensor], want: Expected, model: nn.Module) -> None:
    """Every coordinate has its share, and no other parameter has one."""
    missing = want.scores.keys() - actual.keys() - want.optional
    assert not missing, f"no score for {sorted(missing)}"
    # A constant that is no parameter may be listed under a name of its own.
    others = dict(model.named_parameters(remove_duplicate=False)).keys() - want.scores.keys()
    assert not others & actual.keys(), f"not coordinates: {sorted(others & actual.keys())}"
    for name in want.scores.keys() & actual.keys():
        torch.testing.assert_close(
            actual[name].to(torch.float64),
            want.scores[name],
            rtol=RTOL,
            atol=1e-16,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_bounds_outputs(model: Sandwich, want: Expected) -> None:
    """A check of the oracle itself: ``|R(x)|_1 <= max(|x|_inf, 1) |Phi|_1``, for inputs of +-1."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        inputs = [
            torch.randint(0, 2, (1, *shape), generator=generator).double() * 2 - 1
            for shape in model.input_shapes
        ]
        with torch.no_grad():
            outputs = model.eval()(*inputs)
        size = sum(float(y.abs().sum()) for y in outputs)
        assert size <= want.path_norm * (1 + RTOL), "the oracle is too small"


def check(item: Case, layout: str) -> None:
    """Compare the package with the oracle: path-norms for q = 0, 1, 2 and all scores for q = 1.

    A case with a spatial layout has q = 1 there and q = 2 in the other, which halves the time.
    """
    exponents: tuple[int, ...] = (0, 1, 2)
    if "spatial" in item.layouts:
        exponents = (1,) if layout == "spatial" else (2,)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads only wait for each other
    try:
        _compare(Sandwich(item.steps, item.shapes, layout), exponents)
    finally:
        torch.set_num_threads(threads)


def _compare(model: Sandwich, exponents: tuple[int, ...]) -> None:
    wanted = {q: expected(model, q) for q in exponents}
    shapes: Any = model.input_shapes if len(model.input_shapes) > 1 else model.input_shapes[0]
    assert_bounds_outputs(model, wanted.get(1) or expected(model, 1))
    model.train(model.layout == "spatial")  # analyses are made in eval mode whatever mode it is in
    if 1 in exponents:
        analysis = fxpath.analyze(model, shapes, dtype=torch.float64)
        assert_norm(analysis.path_norm, wanted[1], 1)
        assert_scores(analysis.scores, wanted[1], model)
    others = [q for q in exponents if q != 1]
    norms = fxpath.path_norms(model, shapes, q=others, dtype=torch.float64) if others else {}
    for q in others:
        assert_norm(norms[q], wanted[q], q)
