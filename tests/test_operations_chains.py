"""Random chains of operations with skip connections: rules have to compose at every border.

A single operation between two layers never meets a tensor whose positions are partly alike, partly
different because of several earlier borders. Here they do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.oracles.blackbox import Case, case, check
from tests.oracles.steps import Call, Step, affine, batch_norm, clamp, homogeneous, maximum

CONV = [nn.Conv1d, nn.Conv2d]
MAX_POOL = [nn.MaxPool1d, nn.MaxPool2d]
AVG_POOL = [nn.AvgPool1d, nn.AvgPool2d]
NORM = [nn.BatchNorm1d, nn.BatchNorm2d]
SEEDS = 48
LAYOUTS = ("dense", "spatial", "bare")
LARGEST = 90  # entries of a tensor: the oracle is dense

Shape = tuple[int, ...]


def _conv(rng: Random, shape: Shape) -> Step:
    dim = len(shape) - 1
    return affine(
        CONV[dim - 1](
            shape[0],
            rng.choice([1, 2, 3]),
            rng.choice([1, 2, 3]),
            stride=rng.choice([1, 1, 2]),
            padding=rng.choice([0, 1]),
            dilation=rng.choice([1, 1, 2]),
            padding_mode=rng.choice(["zeros", "zeros", "circular", "replicate", "reflect"]),
            bias=rng.random() < 0.7,
        )
    )


def _max_pool(rng: Random, shape: Shape) -> Step:
    kernel, ceil = rng.choice([2, 3]), rng.random() < 0.5
    return maximum(
        MAX_POOL[len(shape) - 2](kernel, rng.choice([1, 2]), rng.choice([0, 1]), ceil_mode=ceil)
    )


def _avg_pool(rng: Random, shape: Shape) -> Step:
    kernel, ceil, counted = rng.choice([2, 3]), rng.random() < 0.5, rng.random() < 0.5
    padding = rng.choice([0, 1])
    return affine(AVG_POOL[len(shape) - 2](kernel, rng.choice([1, 2]), padding, ceil, counted))


def _adaptive(rng: Random, shape: Shape) -> Step:
    size = [rng.choice([1, 2, 3, 5]) for _ in shape[1:]]
    name = f"pool{len(shape) - 1}d"
    if rng.random() < 0.5:
        return affine(lambda x: getattr(functional, f"adaptive_avg_{name}")(x, size))
    return maximum(lambda x: getattr(functional, f"adaptive_max_{name}")(x, size))


def _upsample(rng: Random, shape: Shape) -> Step:
    size = tuple(n + rng.choice([0, 1, 3]) for n in shape[1:])
    mode = rng.choice(["nearest", "nearest-exact", ["linear", "bilinear"][len(shape) - 2]])
    corners = rng.random() < 0.5 if "linear" in mode else None
    return affine(nn.Upsample(size, mode=mode, align_corners=corners))


def _pad(rng: Random, shape: Shape) -> Step:
    mode = rng.choice(["constant", "constant", "reflect", "replicate", "circular"])
    # PyTorch's circular padding may read memory that nobody wrote where it crops, too.
    least = 0 if mode == "circular" else -1
    amounts = [rng.randint(least, 2) for _ in range(2 * len(shape) - 2)]
    value = rng.choice([0.0, 1.5]) if mode == "constant" else None
    return affine(lambda x: functional.pad(x, amounts, mode, value))


def _move(rng: Random, shape: Shape) -> Step:
    axis = rng.randrange(1, len(shape) + 1)
    count = shape[axis - 1]
    start, step = rng.randrange(count), rng.choice([1, 2])
    order = [rng.randrange(count) for _ in range(rng.choice([1, 2, 4]))]
    return affine(
        rng.choice(
            [
                lambda x: x.flip(axis),
                lambda x: x.roll(start + 1, axis),
                lambda x: x.transpose(1, axis),
                lambda x: x.narrow(axis, start, count - start),
                lambda x: x.index_select(axis, torch.tensor(order)),
                lambda x: x[(slice(None),) * axis + (slice(start, None, step),)],
                lambda x: x.mean(axis, keepdim=True),
                lambda x: x.reshape(len(x), *shape[::-1]),
                lambda x: torch.cat([x.narrow(axis, 0, 1) * 3, -x], axis),
                lambda x: (
                    torch.linspace(-1, 1.7, count, dtype=torch.float64) + x.transpose(axis, -1)
                ),
            ]
        )
    )


def _activation(rng: Random, shape: Shape) -> Step:
    return rng.choice(
        [
            homogeneous(nn.ReLU()),
            homogeneous(nn.PReLU(shape[0])),
            clamp(nn.ReLU6()),
            clamp(nn.Hardtanh(-0.5, 2.0)),
        ]
    )


def _norm(rng: Random, shape: Shape) -> Step:
    # An addition before it: a norm right after a convolution would be folded.
    return batch_norm(NORM[len(shape) - 2](shape[0]))


MENU: list[Callable[[Random, Shape], Step]] = [
    *(_conv, _conv, _conv, _max_pool, _max_pool, _avg_pool, _adaptive, _upsample),
    *(_pad, _pad, _move, _move, _activation, _activation, _norm),
]


def _shapes_after(step: Step, *shapes: Shape) -> Shape | None:
    """The output's shape, or None where the operation does not apply or the result is large."""
    module = step.module.eval().double()
    try:
        with torch.no_grad():
            output = module(*[torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes])
    except (RuntimeError, ValueError, IndexError):
        return None
    shape = tuple(output.shape[1:])
    fits = len(shape) == len(shapes[0]) and 0 < math.prod(shape) <= LARGEST
    return shape if fits else None


def _join(rng: Random, shapes: list[Shape]) -> Step | None:
    """The last tensor together with an earlier one (or with itself)."""
    last = len(shapes) - 1
    for other in rng.sample(range(len(shapes)), len(shapes)):
        ops = [
            affine(torch.add),
            affine(torch.sub),
            maximum(torch.maximum),
            affine(lambda x, y: torch.cat([x, y], 1)),
            affine(lambda x, y: torch.cat([x, y], -1)),
        ]
        for step in rng.sample(ops, len(ops)):
            if _shapes_after(step, shapes[last], shapes[other]) is not None:
                if other != last or rng.random() < 0.2:
                    return Step(step.module, step.rule, (last, other))
    return None


def random_case(seed: int) -> Case:
    """Four to eight operations, each on the last tensor and perhaps on an earlier one."""
    rng = Random(seed)
    shape: Shape = (2, 8) if rng.random() < 0.5 else (2, 4, 5)
    steps: list[Step] = []
    shapes = [shape]
    folds = False  # the last tensor is a convolution's output
    for _ in range(rng.randrange(4, 9)):
        make = rng.choice(MENU)
        step = _join(rng, shapes) if rng.random() < 0.25 else None
        if step is None:
            if make is _norm and (folds or not steps):
                continue
            candidate = make(rng, shapes[-1])
            step = Step(candidate.module, candidate.rule, (len(shapes) - 1,))
        after = _shapes_after(step, *[shapes[k] for k in step.reads or ()])
        if after is None:
            continue
        folds = isinstance(step.module, nn.Conv1d | nn.Conv2d)
        steps.append(step)
        shapes.append(after)
    return case(f"seed-{seed}", shapes[0], *steps, layouts=(LAYOUTS[seed % 3],))


def _describe(item: Case) -> str:
    names = []
    for step in item.steps:
        name = str(step.module)
        if isinstance(step.module, Call):
            name = getattr(step.module.function, "__name__", name)
        if "<lambda>" in name:
            function = step.module.function
            values = inspect.getclosurevars(function).nonlocals
            name = f"{inspect.getsource(function).strip()} {values}"
        names.append(f"{step.reads} {name}")
    return "\n".join(names)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_chains(seed: int) -> None:
    item = random_case(seed)
    try:
        check(item, *item.layouts)
    except Exception as error:
        error.add_note(_describe(item))
        raise


def test_chains_are_varied() -> None:
    """The generator reaches every operation, and most chains have a skip connection."""
    cases = [random_case(seed) for seed in range(SEEDS)]
    kinds = {type(step.module).__name__ for item in cases for step in item.steps}
    assert kinds >= {"Conv1d", "Conv2d", "MaxPool1d", "MaxPool2d", "BatchNorm1d", "BatchNorm2d"}
    assert kinds >= {"AvgPool1d", "AvgPool2d", "Upsample", "ReLU", "PReLU", "ReLU6", "Call"}
    joins = [any(len(step.reads or ()) > 1 for step in item.steps) for item in cases]
    assert sum(joins) > SEEDS / 2
    assert sum(len(item.steps) for item in cases) > 4 * SEEDS
