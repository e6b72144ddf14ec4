"""The reverse half of each word, against autograd of the plain graph and finite differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxpath.graph.schema import target
from fxpath.graph.spec import violations
from fxpath.passes.derive import Ending, derive, leaves
from fxpath.passes.words import WORDS
from tests.support.lowered import CASES, drawn, plain, setting


def called(derived: fx.GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    names = [str(n.target) for n in derived.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        found: dict[str, Any] = derived(*(tensors[name] for name in names))
    return found


def value(found: Mapping[str, Any]) -> float:
    return float(found["mantissa"]) * 2.0 ** float(found["exponent"])


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Up to rounding, of the largest entry."""
    assert found.dtype == dtype and found.shape == expected.shape
    top = float(expected.abs().max()) if expected.numel() else 0.0
    rounding = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rounding * top)


def test_every_word_is_met() -> None:
    met = set()
    for name in CASES:
        module, _ = drawn(name)
        stage = "lifted" if name == "ignored" else "lowered"
        assert violations(module, stage, None) == [], name
        met |= {target(node) for node in module.graph.nodes}
    assert set(WORDS) - met == set()


#: Cases with numbers that are raised to q elsewhere than where they are read, or with none at all.
RAISED = ("source", "conv 1d", "clamp", "slope", "along", "tied", "half dead", "dead", "empty")


@pytest.mark.parametrize(
    ("name", "q", "dtype", "endings"),
    [(name, 1, torch.float64, ("norm", "scores", "gradients")) for name in CASES]
    + [(name, 1, torch.float32, ("scores",)) for name in CASES]
    + [(name, q, torch.float64, ("scores", "gradients")) for name in RAISED for q in (0, 0.5, 2)],
)
def test_agrees_with_autograd(
    name: str, q: float, dtype: torch.dtype, endings: tuple[Ending, ...]
) -> None:
    module, tensors = drawn(name, q)
    norm, gradients, shares, lifted = plain(module, tensors, q)
    assert (norm == 0) == (name == "dead")
    near = 1e-12 if dtype == torch.float64 else 2e-6
    for ending in endings:
        found = called(derive(module, setting(q), dtype, ending), tensors)
        assert value(found) == pytest.approx(norm, rel=near)
        assert found["exponent"] == found["exponent"].floor()
        assert ("mass" in found) == ("smallest" not in found) == (ending != "norm")
        if ending == "scores":
            assert list(found["scores"]) == list(shares)
            for share, expected in zip(found["scores"].values(), shares.values(), strict=True):
                close(share, expected, dtype)
        if ending == "gradients":
            assert len(found["gradients"]) == len(gradients) == len(leaves(module))
            for grad, expected, leaf in zip(found["gradients"], gradients, lifted, strict=True):
                # Of a layer of zeros alone none is asked for: that of |w| is 0 there.
                asked = leaf != 0 if name == "half dead" else torch.ones_like(leaf, dtype=bool)
                close(grad * asked, expected * asked, dtype)


@pytest.mark.parametrize("name", CASES)
def test_gradients_behind_zeros(name: str) -> None:
    """By effective parameters all of them are right, those of a layer of zeros included."""
    module, tensors = drawn(name, 2)
    _, gradients, _, _ = plain(module, tensors, 2)
    derived = derive(module, setting(2, effective=True), torch.float64, "gradients")
    for grad, expected in zip(called(derived, tensors)["gradients"], gradients, strict=True):
        close(grad, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "dead"])
def test_agrees_with_finite_differences(name: str) -> None:
    """Of the logarithm of the norm, along one direction for each tensor that is read."""
    module, tensors = drawn(name)
    norm = derive(module, setting(), torch.float64, "norm")
    found = called(derive(module, setting(), torch.float64, "gradients"), tensors)["gradients"]
    step, generator = 1e-4, torch.Generator().manual_seed(1)
    for moving, tensor in tensors.items():
        by = torch.exp(step * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
        ends = [{**tensors, moving: tensor * by**sign} for sign in (1, -1)]
        logs = [math.log(value(called(norm, end))) for end in ends]
        up, down = (plain(module, end, 1)[3] for end in ends)
        expected = sum(
            float((grad * (a - b)).sum()) for grad, a, b in zip(found, up, down, strict=True)
        )
        assert (logs[0] - logs[1]) / step == pytest.approx(expected / step, rel=1e-6, abs=1e-7)
