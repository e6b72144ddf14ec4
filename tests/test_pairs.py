"""What a pair is: signed networks are compared, and what passes is held against real modules."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath

Run = Callable[["Net", Tensor, Tensor, Tensor, Tensor], Any]


class Net(nn.Module):
    """Two convolutions of two inputs, and a function of both."""

    def __init__(self, run: Run, **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(2, 4, 3, padding=1)
        self.run = run
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.run(self, self.a(x), self.b(z), x, z)


INPUTS = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)
MASK = torch.tensor([True, False] * 3)

#: Families of functions; all pairs within a family are tried.
FAMILIES: dict[str, dict[str, Run]] = {
    "signs": {
        "identity": lambda m, h, g, x, z: h,
        "negative": lambda m, h, g, x, z: -h,
        "relu": lambda m, h, g, x, z: h.relu(),
        "absolute": lambda m, h, g, x, z: h.abs(),
    },
    "of two": {
        "sum": lambda m, h, g, x, z: h + g,
        "difference": lambda m, h, g, x, z: h - g,
        "larger": lambda m, h, g, x, z: torch.maximum(h, g),
        "smaller": lambda m, h, g, x, z: torch.minimum(h, g),
    },
    "masks": {
        "masked": lambda m, h, g, x, z: torch.where(MASK, h, g),
        "masked the other way": lambda m, h, g, x, z: torch.where(MASK, g, h),
    },
    "inputs": {
        "first": lambda m, h, g, x, z: m.a(x),
        "second": lambda m, h, g, x, z: m.a(z),
        "first itself": lambda m, h, g, x, z: x.repeat(1, 2, 1),
        "second itself": lambda m, h, g, x, z: z.repeat(1, 2, 1),
    },
    "numbers": {
        "shifted": lambda m, h, g, x, z: torch.add(h, m.a.bias[:, None], alpha=2.0),
        "shifted back": lambda m, h, g, x, z: torch.add(h, m.a.bias[:, None], alpha=-3.0),
        "scaled": lambda m, h, g, x, z: h * -2.0,
    },
    "outputs": {
        "in order": lambda m, h, g, x, z: (h, g),
        "swapped": lambda m, h, g, x, z: (g, h),
        "one twice": lambda m, h, g, x, z: (h, h),
    },
}  # fmt: skip


def difference(first: nn.Module, second: nn.Module) -> float:
    """The largest l^1 difference on random inputs and corners, in float64."""
    generator = torch.Generator().manual_seed(1)
    points = [torch.rand(100, 2, 6, generator=generator, dtype=torch.float64) * 2 - 1 for _ in "xz"]
    for x in points:
        x[:50].sign_()
    rows = []
    for model in (first, second):
        found = copy.deepcopy(model).double()(*points)
        parts = found if isinstance(found, tuple) else (found,)
        rows.append(torch.cat([part.flatten(1) for part in parts], 1))
    return (rows[0] - rows[1]).abs().sum(1).max().item()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_two_functions_have_a_certificate_that_their_outputs_exceed(family: str) -> None:
    nets = {name: Net(run).eval() for name, run in FAMILIES[family].items()}
    for one, two in itertools.combinations(nets, 2):
        first, second = nets[one], nets[two]
        try:
            bound = fxpath.lipschitz_bound(first, second, example_inputs=INPUTS)
        except ValueError as error:
            assert "another architecture" in str(error)
            continue
        gap = difference(first, second)
        assert gap <= float(bound), (one, two)
        try:
            assert gap <= fxpath.path_metric(first, second, example_inputs=INPUTS).upper
        except ValueError as error:
            assert "fixed coefficients are architecture" in str(error)
    assert float(fxpath.lipschitz_bound(first, first, example_inputs=INPUTS)) == 0


def test_the_check_of_these_tests_can_fail() -> None:
    nets = [Net(run) for run in FAMILIES["signs"].values()]
    assert difference(nets[0], nets[1]) > 1 and difference(nets[0], nets[0]) == 0


@pytest.mark.parametrize(
    ("one", "two", "place"),
    [
        ("identity", "relu", r"aten.relu.default of the.*|aten.relu.default of relu"),
        ("relu", "absolute", "aten.relu.default.*in the model is aten.abs.default"),
    ],
)
def test_a_refusal_names_the_first_place_on_both_sides(one: str, two: str, place: str) -> None:
    first, second = (Net(FAMILIES["signs"][name]) for name in (one, two))
    with pytest.raises(ValueError, match=place):
        fxpath.path_metric(first, second, example_inputs=INPUTS)


def test_another_input_is_another_architecture() -> None:
    first, second = (Net(FAMILIES["inputs"][name]) for name in ("first", "second"))
    with pytest.raises(
        ValueError, match=r"input 0 \(1x2x6\) in the model is input 1 \(1x2x6\) there"
    ):
        fxpath.lipschitz_bound(first, second, example_inputs=INPUTS)


def test_a_cast_that_rounds_activations_belongs_to_the_function() -> None:
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    class Rounded(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).half().float())

    rounded = Rounded(*plain)
    with pytest.raises(ValueError, match=r"no further cast in the model is .* to torch.float16"):
        fxpath.lipschitz_bound(plain, rounded, (3,))
    assert float(fxpath.lipschitz_bound(rounded, rounded, (3,))) == 0
    # The same model in another format is the same function.
    assert fxpath.path_metric(plain, copy.deepcopy(plain).double(), (3,)).upper == 0


# State dicts with other buffers -----------------------------------------------------------

BUFFERS: dict[str, tuple[Run, Tensor, Tensor]] = {
    "mask": (
        lambda m, h, g, x, z: torch.where(m.t > 0, h, g),
        torch.tensor([1.0, -1] * 3), torch.tensor([-1.0, 1] * 3),
    ),
    "mask and factor": (
        lambda m, h, g, x, z: torch.where(m.t > 0, h * m.t, g),
        torch.tensor([1.0, -1] * 3), torch.tensor([-1.0, 1] * 3),
    ),
    "order": (
        lambda m, h, g, x, z: h[:, m.t], torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2, 3]),
    ),
    "factor": (
        lambda m, h, g, x, z: h * m.t, torch.tensor([1.0, 2, 3, 4, 5, 6]),
        torch.tensor([1.0, 2, -3, 4, 5, 6]),
    ),
    "bound": (
        lambda m, h, g, x, z: torch.maximum(h, m.t), torch.tensor(0.1), torch.tensor(0.2),
    ),
    "same mask": (
        lambda m, h, g, x, z: torch.where(m.t > 0, h, g),
        torch.tensor([1.0, -1] * 3), torch.tensor([2.0, -3] * 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BUFFERS))
def test_a_state_dict_with_another_buffer_is_another_network(name: str) -> None:
    run, own, other = BUFFERS[name]
    first, second = Net(run, t=own).eval(), Net(run, t=other).eval()
    gap = difference(first, second)
    assert (gap == 0) == (name == "same mask")
    found = []
    for given in (second, second.state_dict()):
        try:
            bound = float(fxpath.lipschitz_bound(first, given, example_inputs=INPUTS))
        except ValueError as error:
            assert "another architecture" in str(error)
            found.append(None)
        else:
            assert gap <= bound
            found.append(bound)
        if gap:
            with pytest.raises(ValueError, match="another architecture|architecture, and a path"):
                fxpath.path_metric(first, given, example_inputs=INPUTS)
    assert found[0] == found[1] and (found[0] is None) == (name == "order")
