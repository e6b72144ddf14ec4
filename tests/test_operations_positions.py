"""Entries that constant positions pick, overwrite or add up, and other fixed linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath
from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import affine, maximum, minimum

SHAPE = (4, 6)
IMAGE = (2, 4, 5)
BRIEF = ("spatial",)
ROWS = torch.tensor([2, 0, 2])
ORDER = torch.tensor([3, 1, 0, 2])
MASK = torch.tensor([True, False, True, True])
GRID = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2


def _spread(index: Tensor, like: Tensor, dim: int) -> Tensor:
    """The same positions for all other axes."""
    shape = [1] * like.dim()
    shape[dim] = -1
    sizes = list(like.shape)
    sizes[dim] = len(index)
    return index.reshape(shape).expand(sizes)


def _uneven(x: Tensor) -> Tensor:
    """Positions along the last axis that differ from row to row."""
    return (torch.arange(8).reshape(4, 2) * 5 % 6).expand(len(x), 4, 2)


def _write(key: Any, value: Any, start: str = "x") -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        y = x * 2 if start == "x" else torch.zeros_like(x)
        y[(slice(None), *key)] = value(x) if callable(value) else value
        return y

    return run


def _stitched(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, :2], y[:, 2:] = x[:, 2:], -x[:, :2]
    return y


def _copied(x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 4, 9, dtype=x.dtype)
    y[:, :, 1:7].copy_(x)
    return y


def _filled_diagonal(x: Tensor) -> Tensor:
    y = x * 1
    y.diagonal(dim1=1, dim2=2).fill_(1.5)
    return y


READS = {
    "two-lists": lambda x: x[:, ROWS, ROWS + 1],
    "list-of-lists": lambda x: x[:, torch.tensor([[0, 1], [3, 3]])],
    "mask": lambda x: x[:, MASK],
    "mask-of-two-axes": lambda x: x[:, torch.eye(4, 6, dtype=torch.bool)],
    "negative": lambda x: x[:, [-1, -3]],
    "gather-rows": lambda x: x.gather(1, _spread(ROWS, x, 1)),
    "gather-uneven": lambda x: x.gather(2, _uneven(x)),
    "take-along": lambda x: torch.take_along_dim(x, ORDER[None, :, None], 1),
    "masked-select": lambda x: x[:, torch.ones(4, 6).tril().bool()],
    "diag-embed": lambda x: torch.diag_embed(x[:, 0]),
    "rot90": lambda x: x.rot90(1, (1, 2)),
    "rot90-back": lambda x: x.rot90(-1, (1, 2)),
    "rot180": lambda x: x.rot90(2, (2, 1)),
    "column-stack": lambda x: torch.column_stack([x, x * 2]),
    "dstack": lambda x: torch.dstack([x, x * 2]),
    "hsplit": lambda x: torch.hsplit(x, 2)[1],
    "dsplit": lambda x: torch.dsplit(x, 3)[1],
    "broadcast": lambda x: torch.broadcast_tensors(x[:, :1], x)[0],
}
WRITES = {
    "slice": _write((slice(1, 3),), lambda x: x[:, :2] * 3),
    "slice-of-zeros": _write((slice(1, 3),), lambda x: x[:, :2], "zeros"),
    "steps": _write((slice(None, None, 2),), 1.5),
    "lists": _write((ROWS[:2], ROWS[:2]), lambda x: x[:, 0, :2] * 2),
    "list": _write(([1, 3],), lambda x: x[:, :2]),
    "mask": _write((MASK,), 2.0),
    "whole": _write((slice(None),), lambda x: x * 3),
    "stitched": _stitched,
    "copied": _copied,
    "diagonal": _filled_diagonal,
    "index-fill": lambda x: x.index_fill(1, ROWS, -2.0),
    "index-copy": lambda x: x.index_copy(1, ORDER, x * 3),
    "index-put-add": lambda x: x.index_put(
        (torch.arange(len(x))[:, None], ROWS), x[:, :3] * 2, accumulate=True
    ),
    "scatter": lambda x: x.scatter(1, _spread(ORDER[:3], x, 1), x[:, :3] * 2),
    "scatter-value": lambda x: x.scatter(1, _spread(ROWS, x, 1), 1.3),
    "scatter-uneven": lambda x: x.scatter(2, _uneven(x), x * 3),
    "masked-scatter": lambda x: torch.stack(
        [row.masked_scatter(torch.eye(4, 6).bool(), row * 3) for row in x.unbind()]
    ),
    "slice-scatter": lambda x: x.slice_scatter(x[:, :2] * 2, 1, 1, 3),
    "select-scatter": lambda x: x.select_scatter(x[:, 0] * 2, 1, -1),
    "diagonal-scatter": lambda x: x.diagonal_scatter(x[:, :, 0] * 2, 0, 1, 2),
}
SUMS = {
    "index-add": lambda x, y: x.index_add(1, ROWS, y[:, :3], alpha=-2),
    "index-put-add": lambda x, y: x.index_put(
        (torch.arange(len(x))[:, None], ROWS), y[:, :3] * 2, accumulate=True
    ),
    "scatter-add": lambda x, y: x.scatter_add(1, _spread(ROWS, x, 1), y[:, :3]),
    "scatter-add-uneven": lambda x, y: x.scatter_add(2, _uneven(x), y),
    "scatter-sum": lambda x, y: x.scatter_reduce(1, _spread(ROWS, x, 1), y * 2, "sum"),
    "scatter-mean": lambda x, y: x.scatter_reduce(1, _spread(ROWS, x, 1), y * 2, "mean"),
    "scatter-mean-alone": lambda x, y: x.scatter_reduce(
        1, _spread(ROWS, x, 1), y * 2, "mean", include_self=False
    ),
    "index-mean": lambda x, y: x.index_reduce(1, ROWS, y[:, :3] * 2, "mean"),
    "diff-with-ends": lambda x, y: x.diff(dim=2, prepend=y[:, :, :1] * 2, append=y[:, :, 1:3]),
}
MAPS = {
    "index-add-zeros": lambda x: torch.zeros_like(x).index_add(1, ROWS, x[:, :3]),
    "trace": lambda x: torch.stack([row.trace()[None] for row in x.unbind()]),
    "block-diag": lambda x: torch.stack([torch.block_diag(r, r[0]) for r in x.unbind()]),
    "cumsum": lambda x: x.cumsum(2),
    "cumsum-negative-axis": lambda x: x.cumsum(-2),
    "diff": lambda x: x.diff(dim=1),
    "diff-of-second-order": lambda x: x.diff(2, dim=2),
    "trapezoid": lambda x: torch.trapezoid(x, dx=0.5, dim=1),
    "cumulative-trapezoid": lambda x: torch.cumulative_trapezoid(x, dx=0.5, dim=1),
    "cumulative-trapezoid-at": lambda x: torch.cumulative_trapezoid(
        x, torch.tensor([0.0, 1.0, 3.0, 2.0]), dim=1
    ),
    "trapezoid-at": lambda x: torch.trapezoid(x, torch.tensor([0.0, 1.0, 3.0, 2.0]), dim=1),
}
RESAMPLED = {
    "bicubic": lambda x: functional.interpolate(x, (7, 3), mode="bicubic"),
    "bicubic-by-factor": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "bicubic-corners": lambda x: functional.interpolate(
        x, (6, 9), mode="bicubic", align_corners=True
    ),
    "bicubic-antialiased": lambda x: functional.interpolate(
        x, (3, 4), mode="bicubic", antialias=True
    ),
    "fold": lambda x: functional.fold(x.flatten(2)[:, :, :20].repeat(1, 2, 1), (5, 6), (2, 2)),
    "fold-padded": lambda x: functional.fold(
        x.flatten(2)[:, :, :12].repeat(1, 2, 1), (5, 7), (2, 2), 1, 1, 2
    ),
    "grid": lambda x: functional.grid_sample(
        x, GRID.to(x).expand(len(x), -1, -1, -1), align_corners=False
    ),
    "grid-bicubic": lambda x: functional.grid_sample(
        x, GRID.to(x).expand(len(x), -1, -1, -1), mode="bicubic", align_corners=True
    ),
    "grid-border": lambda x: functional.grid_sample(
        x, GRID.to(x).expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False
    ),
}


def _cases(table: dict[str, Any], shape: tuple[int, ...]) -> list[Any]:
    return parameters(case(name, shape, affine(op), layouts=BRIEF) for name, op in table.items())


@pytest.mark.parametrize(("item", "layout"), _cases(READS, SHAPE))
def test_reading(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), _cases(WRITES, SHAPE))
def test_writing(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(
    ("item", "layout"),
    parameters(case(name, [SHAPE, SHAPE], affine(op), layouts=BRIEF) for name, op in SUMS.items()),
)
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_adding(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), _cases(MAPS, SHAPE))
def test_mapping(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), _cases(RESAMPLED, IMAGE))
def test_resampling(item: Case, layout: str) -> None:
    """Taps that read one position are added with their signs, before the power."""
    check(item, layout)


EXTREMA = [
    case(
        "scatter-amax",
        SHAPE,
        maximum(lambda x: x.scatter_reduce(1, _spread(ROWS, x, 1), x[:, 1:], "amax")),
    ),
    case(
        "scatter-amin",
        SHAPE,
        minimum(lambda x: x.scatter_reduce(1, _spread(ROWS, x, 1), x[:, 1:], "amin")),
    ),
    case(
        "scatter-amax-alone",
        SHAPE,
        maximum(
            lambda x: x.scatter_reduce(1, _spread(ROWS, x, 1), x[:, 1:], "amax", include_self=False)
        ),
    ),
    case("index-amax", SHAPE, maximum(lambda x: x.index_reduce(1, ROWS, x[:, 1:], "amax"))),
]


@pytest.mark.parametrize(("item", "layout"), parameters(EXTREMA))
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_comparing(item: Case, layout: str) -> None:
    """Entries that come to one place are compared: k-max-pooling."""
    check(item, layout)


class Graph(nn.Module):
    """Message passing along edges that a buffer holds, or by a sparse or dense matrix."""

    def __init__(self, how: str) -> None:
        super().__init__()
        edges = torch.tensor([[0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 0, 1]])
        matrix = torch.zeros(5, 5).index_put((edges[1], edges[0]), torch.ones(6))
        self.first, self.last, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how
        self.register_buffer("edges", edges)
        self.register_buffer("matrix", matrix.to_sparse() if how == "sparse" else matrix)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """Nodes by features; there is no batch axis."""
        h = self.first(x).relu()
        source, target = self.edges
        if self.how == "index_add":
            message = torch.zeros_like(h).index_add(0, target, h[source])
        elif self.how == "gather":
            index = source[:, None].expand(-1, 4)
            message = torch.zeros_like(h).index_add(0, target, h.gather(0, index))
        elif self.how == "sparse":
            message = torch.sparse.mm(self.matrix, h)
        else:
            message = self.matrix @ h
        return self.last(message + h)


@pytest.mark.parametrize("how", ["index_add", "gather", "sparse"])
def test_fixed_graphs(how: str) -> None:
    model, dense, x = Graph(how), Graph("dense"), torch.randn(5, 3)
    torch.testing.assert_close(model(x), dense(x))
    norms = [fxpath.path_norm(m, example_inputs=x, batch_dim=None) for m in (model, dense)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
