"""The spatial reduction against the network at full resolution, in float64.

Both run through the same interpretation, whose full-resolution results are checked elsewhere
against references that share nothing with the package; here the reduction alone is on trial.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxpath
from fxpath.graph.links import mark_static
from fxpath.model import Given
from fxpath.passes.bases import cheapest, edges
from fxpath.passes.classes import Classes, find_classes
from fxpath.passes.lower import lower
from fxpath.passes.reduce import reduce
from fxpath.passes.setting import Setting
from fxpath.program.flat import Flat
from fxpath.program.program import PathProgram, build
from fxpath.program.theta import score_shapes
from tests.support import zoo
from tests.support.spatial import Dag

Choose = Callable[[Classes], dict[fx.Node, bool]]


def closed(choice: dict[fx.Node, bool], classes: Classes) -> dict[fx.Node, bool]:
    """The smallest allowed choice that contains a given one: what is read from sums is sums."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for read, reader in edges(classes):
        readers.setdefault(read, []).append(reader)
    stack = [node for node, sums in choice.items() if sums]
    while stack:
        for reader in readers.get(stack.pop(), []):
            if not choice[reader]:
                choice[reader] = True
                stack.append(reader)
    return choice


def values_only(classes: Classes) -> dict[fx.Node, bool]:
    return dict.fromkeys(classes.reachable, False)


def sums_only(classes: Classes) -> dict[fx.Node, bool]:
    return dict.fromkeys(classes.reachable, True)


def at_random(seed: int) -> Choose:
    def choose(classes: Classes) -> dict[fx.Node, bool]:
        rng = random.Random(seed)
        return closed({node: rng.random() < 0.2 for node in classes.reachable}, classes)

    return choose


@dataclass
class Found:
    log: float
    shares: dict[str, torch.Tensor]


def run(program: PathProgram, module: fx.GraphModule) -> Found:
    shares = {
        name: torch.full(shape, math.nan, dtype=torch.float64)
        for name, shape in score_shapes(module).items()
    }
    flat = Flat(module, Setting(program.captured, program.q))
    found = flat.scores(program.captured.live(), torch.float64, list(shares.values()))
    log = math.log(found.mantissa) if found.mantissa else -math.inf
    return Found(log + found.exponent * math.log(2), shares)


def assert_same(found: Found, expected: Found, tolerance: float = 1e-10) -> None:
    difference = abs(found.log - expected.log)
    assert difference <= tolerance, f"path-norms differ by {difference}"
    assert found.shares.keys() == expected.shares.keys()
    for name, share in expected.shares.items():
        gap = float((found.shares[name] - share).abs().max())
        assert gap <= tolerance * float(share.max()), f"shares of {name} differ by {gap}"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dims=st.sampled_from([1, 1, 2, 2, 3]),
    seed=st.integers(0, 10**6),
    depth=st.integers(2, 9),
    head=st.sampled_from(["dense", "pooled", "flatten"]),
    q=st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.0, 0.5]),
)
def test_generated_networks_in_every_basis(
    dims: int, seed: int, depth: int, head: str, q: float
) -> None:
    model = Dag(dims, seed, depth, head).eval()
    program = build(model, Given((2, *model.extent)), q=q, dtype=torch.float64, reduced=False)
    expected = run(program, program.lifted)
    for choose in (cheapest, values_only, sums_only, at_random(seed)):
        reduced = reduce(program.lifted, Setting(program.captured, q), choose)
        assert_same(run(program, reduced), expected)
        assert_same(run(program, lower(reduced, Setting(program.captured))), expected)
    assert_same(run(program, lower(program.lifted, Setting(program.captured))), expected)


@pytest.mark.parametrize("name", ["resnet18", "densenet", "shufflenet_v2_x0_5", "fcn"])
def test_real_networks(name: str) -> None:
    model = zoo.build(name)
    program = build(model, Given(zoo.MEDIUM), dtype=torch.float64, reduced=False)
    expected = run(program, program.lifted)
    reduced = reduce(program.lifted, Setting(program.captured))
    assert_same(run(program, reduced), expected)
    assert_same(run(program, lower(reduced, Setting(program.captured))), expected)


def test_a_wrong_matrix_is_noticed() -> None:
    model = Dag(2, 0, 4, "pooled")
    program = build(model, Given((2, *model.extent)), dtype=torch.float64, reduced=False)
    expected = run(program, program.lifted)
    reduced = reduce(program.lifted, Setting(program.captured))
    for module, kind in ((reduced, "matrix"), (lower(reduced, Setting(program.captured)), "map")):
        name, matrix = next((n, m) for n, m in module.named_buffers() if n.startswith(kind))
        setattr(module, name, matrix * 1.001)
        with pytest.raises(AssertionError):
            assert_same(run(program, module), expected)


def test_extents_of_resnet18_do_not_grow_with_the_input() -> None:
    model = zoo.build("resnet18")
    kept = []
    for side in (224, 448):
        rows = fxpath.compile(model, (3, side, side), backend="eager").sizes()
        kept.append([row["reduced"] for row in rows if row["operation"] == "conv"])
    assert kept[0] == kept[1]
    assert kept[0][0] == (1, 64, 4, 4) and kept[0][-1] == (1, 512, 1, 1)


def test_classes_of_a_padded_convolution() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv1d(1, 1, 3, padding=1))
    program = build(model, Given((1, 9)), reduced=False)
    mark_static(program.lifted.graph)
    classes = find_classes(program.lifted.graph)
    convs = [n for n in classes.reachable if getattr(n.target, "__name__", "") == "conv"]
    assert [classes.reachable[n][2].of.tolist() for n in convs] == [
        [0, 1, 1, 1, 1, 1, 1, 1, 2],
        [0, 1, 2, 2, 2, 2, 2, 3, 4],
    ]
    # The last sum reads border positions by two taps, the others by three.
    assert classes.observable[convs[0]][2].sizes.tolist() == [1, 7, 1]
    assert classes.observable[convs[1]][2].sizes.tolist() == [9]


def test_reduction_can_be_switched_off() -> None:
    model = zoo.build("squeezenet1_1")
    shape = zoo.INPUTS["squeezenet1_1"]
    on = fxpath.analyze(model, shape, dtype=torch.float64)
    off = fxpath.analyze(model, shape, dtype=torch.float64, reduce=False)
    assert on.path_norm == pytest.approx(off.path_norm, rel=1e-10)
