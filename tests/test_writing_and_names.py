"""Writes through views that repeat entries, names of coordinates, and what pairs can see."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fxpath

ROWS = torch.tensor([2, 0, 1])


class Around(nn.Module):
    """A layer, a function of ``[1, 4]`` or ``[1, 3, 4]`` values, and a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.before = nn.Linear(3, 4 * (len(shape) == 1) or 12).double()
        self.after = nn.LazyLinear(2).double()
        self.function, self.shape = function, shape
        self(torch.zeros(1, 3, dtype=torch.float64))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y = self.function(self.before(x).reshape(1, *self.shape))
        return self.after(y.reshape(1, -1))


def _in_place(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def run(h: Tensor) -> Tensor:
        write(h)
        return h

    return run


def _diagonal(h: Tensor) -> Tensor:
    square = h.reshape(2, 2).clone()
    square.fill_diagonal_(2.0)
    return square.reshape(1, 4)


WRITES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "whole-axis": (_in_place(lambda h: h[0].mul_(2)), lambda h: h * 2),
    "repeated-row": (_in_place(lambda h: h.expand(3, 4)[1].mul_(2)), lambda h: h * 2),
    "repeated-part": (
        _in_place(lambda h: h.expand(3, 4)[0:1, :2].add_(1.5)),
        lambda h: torch.cat([h[:, :2] + 1.5, h[:, 2:]], 1),
    ),
    "not-repeated": (_in_place(lambda h: h.expand(1, 4).add_(2)), lambda h: h + 2),
    "new-axis": (_in_place(lambda h: h.expand(2, 1, 4)[0].relu_()), lambda h: h.relu()),
    "fill-diagonal": (
        _diagonal,
        lambda h: h * torch.tensor([0.0, 1, 1, 0]) + torch.tensor([2.0, 0, 0, 2]),
    ),
    "as-strided": (
        lambda h: h.clone().as_strided((2, 2), (1, 2)),
        lambda h: h[:, [0, 2, 1, 3]],
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_through_views(name: str) -> None:
    """``base + (new - base)``, as torch writes it, is the new value and nothing else."""
    model, twin = (Around(function, (4,)) for function in WRITES[name])
    x = torch.randn(1, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    wanted = fxpath.path_norm(twin, (3,))
    for reduced in (True, False):
        assert fxpath.path_norm(model, (3,), reduce=reduced) == pytest.approx(wanted, rel=1e-12)


class Named(nn.Module):
    """Weights that the root computes, and modules that compute their own."""

    def __init__(self) -> None:
        super().__init__()
        self.importance = nn.Parameter(torch.randn(5, 5))
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))
        self.register_buffer("adjacency", torch.ones(5, 5).tril())
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("var", torch.ones(4))
        self.pruned, self.normed = nn.Linear(4, 3), parametrizations.weight_norm(nn.Linear(3, 3))
        prune.l1_unstructured(self.pruned, "weight", 2)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        x = F.linear(x, self.importance * self.adjacency) + torch.zeros_like(x)
        x = F.linear(x, self.left @ self.right)
        x = F.batch_norm(x, self.mean, self.var)
        return self.normed(self.pruned(x.relu()).relu())


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_every_coordinate_has_a_name_that_exists() -> None:
    model = Named()
    names = ["importance", "left", "mean", "pruned.weight", "pruned.bias"]
    assert list(fxpath.analyze(model, (5,)).scores) == [*names, "normed.weight", "normed.bias"]
    program = torch.export.export(model.eval(), (torch.zeros(1, 5),))
    assert list(fxpath.analyze(program).scores) == [*names, "normed.weight", "normed.bias"]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda x: x.sort(2)[0],
    "sort-descending": lambda x: x.sort(2, descending=True)[0],
    "identity": lambda x: x,
    "flip": lambda x: x.flip(2),
    "cumsum": lambda x: x.cumsum(2),
    "cumsum-of-opposites": lambda x: (-x).cumsum(2),
    "cummax": lambda x: x.cummax(2)[0],
    "cummin": lambda x: x.cummin(2)[0],
    "add": lambda x: torch.zeros_like(x).index_add(1, ROWS, x),
    "subtract": lambda x: torch.zeros_like(x).index_add(1, ROWS, x, alpha=-1),
    "fill": lambda x: x.index_fill(1, ROWS[:1], 1.0),
    "fill-opposite": lambda x: x.index_fill(1, ROWS[:1], -1.0),
    "fill-elsewhere": lambda x: x.index_fill(1, ROWS[1:2], 1.0),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "other-clamp": lambda x: (x - 3).clamp(0, 6) / 6,
    "lerp": lambda x: torch.lerp(x, x.abs(), 0.3),
    "lerp-back": lambda x: torch.lerp(x.abs(), x, 0.3),
    "diff": lambda x: x.diff(dim=2),
    "diff-opposite": lambda x: -x.diff(dim=2),
}


ALIKE = [
    ("sort", "sort-descending"),
    ("identity", "flip"),
    ("cumsum", "cumsum-of-opposites"),
    ("cummax", "cummin"),
    ("add", "subtract"),
    ("fill", "fill-opposite"),
    ("fill", "fill-elsewhere"),
    ("hardsigmoid", "other-clamp"),
    ("lerp", "lerp-back"),
    ("diff", "diff-opposite"),
]


@pytest.mark.parametrize("names", ALIKE)
def test_pairs_see_ranks_signs_and_positions(names: tuple[str, str]) -> None:
    """Different functions are no pair, also where path mass is the same."""
    one, two = (Around(FUNCTIONS[name], (3, 4)) for name in names)
    x = torch.randn(1, 3, dtype=torch.float64)
    assert not torch.allclose(one(x), two(x))
    with pytest.raises(ValueError, match="architecture"):
        fxpath.path_metric(one, two, (3,))


@pytest.mark.parametrize("name", ["sort", "cummax", "subtract", "fill", "hardsigmoid", "diff"])
def test_bounds_hold(name: str) -> None:
    model, other = Around(FUNCTIONS[name], (3, 4)), Around(FUNCTIONS[name], (3, 4))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x = torch.rand(50, 1, 3, dtype=torch.float64) * 2 - 1
    gap = max(float((model(each) - other(each)).abs().sum().detach()) for each in x)
    assert gap <= float(fxpath.lipschitz_bound(model, other, (3,)))
    assert fxpath.path_metric(model, model, (3,)).upper == 0


class Picked(nn.Module):
    """A weight whose entries are picked by a constant list, some of them twice, one never."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.how = nn.Parameter(torch.randn(3, 4)), how
        self.register_buffer("order", torch.tensor([2, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "index":
            return nn.functional.linear(x, self.w[self.order])
        if self.how == "index_select":
            return nn.functional.linear(x, self.w.index_select(0, self.order))
        return nn.functional.linear(x, nn.functional.embedding(self.order, self.w))


@pytest.mark.parametrize("how", ["index", "index_select", "embedding"])
@pytest.mark.parametrize("compiled", [False, True])
def test_picked_entries_are_scored_in_their_parameter(how: str, compiled: bool) -> None:
    model = Picked(how)
    analysis = fxpath.analyze(model, (4,), compile=compiled)
    sizes = model.w.detach().abs()
    expected = torch.stack([sizes[0], torch.zeros(4), 2 * sizes[2]])
    assert analysis.path_norm == pytest.approx(float(expected.sum()), rel=1e-6)
    torch.testing.assert_close(analysis.path_magnitude("w"), expected)
    assert analysis.layers[0]["shape"] == (3, 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.w[2, 1] = 0
    metric = fxpath.path_metric(model, other, (4,))
    assert metric.value == pytest.approx(float(2 * sizes[2, 1]), rel=1e-9)
    assert fxpath.rescale(model, (4,)).w.shape == (3, 4)


def test_a_division_by_a_parameter_that_is_0() -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x / self.d

    with pytest.raises(ValueError, match="d: the effective value is NaN or infinite"):
        fxpath.path_norm(Divided(), (2,))
