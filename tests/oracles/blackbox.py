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
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath
from tests.oracles.steps import Coordinates, Shape, Step, Values, as_tuple, flat
from tests.support.nets import randomize

RTOL = 1e-10


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
        return self.run(inputs, lambda k, arguments: as_tuple(self.parts[k](*arguments)))


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
        randomize(self.op, weights=True)
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
        randomize(self.before, seed=1, weights=True)
        randomize(self.after, seed=2, weights=True)

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
    total = flat(values).sum()
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
