"""Operations that are the same as others written out: function, path-norm and scores agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath
from tests.support.capturing import skip_what_torch_cannot_trace
from tests.support.nets import randomize

F = functional
INF = float("inf")
SHAPES = {"A": (3, 4), "B": (4, 4), "C": (4, 4), "v": (4,), "w": (4,), "W": (2, 4, 4)}
SPARSE = torch.tensor([[0.0, 2.0, 0.0, -1.0], [1.0, 0.0, 0.0, 0.0]]).double()
STORED = SPARSE[:, :3].to_sparse()
ONES = torch.ones(4).double()


class Twin(nn.Module):
    """A layer, an operation that may read parameters by name, and a layer."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op = op
        self.p = nn.ParameterDict({k: nn.Parameter(torch.empty(s)) for k, s in SHAPES.items()})
        self.before, self.after = nn.Linear(2, 12), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        """Operations see activations ``[3, 4]``."""
        y = self.op(self.before(x).reshape(3, 4), self.p)
        return self.after(y.reshape(1, -1))


def _made(op: Callable[..., Tensor]) -> Twin:
    model = Twin(op).double()
    model(torch.zeros(1, 2, dtype=torch.float64))
    randomize(model, weights=True)
    return model


def _instance(x: Tensor, p: Any) -> Tensor:
    return F.instance_norm(x.T[None], ONES * 0.3, ONES * 2, p.v, p.w, use_input_stats=False)[0].T


Op = Callable[[Tensor, Any], Tensor]
PRODUCTS: dict[str, tuple[Op, Op]] = {
    "addmm": (lambda x, p: torch.addmm(x, p.A, p.B), lambda x, p: x + p.A @ p.B),
    "addmm-scaled": (
        lambda x, p: torch.addmm(x, p.A, p.B, beta=-2, alpha=0.5),
        lambda x, p: -2 * x + (p.A @ p.B) * 0.5,
    ),
    "addmm-active": (
        lambda x, p: torch.addmm(p.v, x, p.B, alpha=3, beta=2),
        lambda x, p: (x @ p.B) * 3 + p.v * 2,
    ),
    "addmv": (lambda x, p: torch.addmv(x[:, 0], p.A, p.v), lambda x, p: x[:, 0] + p.A @ p.v),
    "baddbmm": (
        lambda x, p: torch.baddbmm(x[:2, None], p.W, p.W),
        lambda x, p: x[:2, None] + p.W @ p.W,
    ),
    "addbmm": (
        lambda x, p: torch.addbmm(p.v, x.expand(2, 3, 4), p.W),
        lambda x, p: (x @ p.W).sum(0) + p.v,
    ),
    "addbmm-parameters": (
        lambda x, p: torch.addbmm(x[0], p.W, p.W),
        lambda x, p: x[0] + (p.W @ p.W).sum(0),
    ),
    "addr": (lambda x, p: torch.addr(p.A, x[:, 0], p.v), lambda x, p: x[:, :1] * p.v + p.A),
    "addr-parameters": (
        lambda x, p: torch.addr(x, p.A[:, 0], p.v),
        lambda x, p: x + p.A[:, :1] * p.v,
    ),
    "addcmul": (lambda x, p: torch.addcmul(x, p.A, p.v, value=2), lambda x, p: x + 2 * (p.A * p.v)),
    "addcmul-active": (
        lambda x, p: torch.addcmul(p.v, x, p.A, value=-2),
        lambda x, p: x * p.A * -2 + p.v,
    ),
    "addcdiv": (lambda x, p: torch.addcdiv(p.v, x, p.A), lambda x, p: x / p.A + p.v),
    "einsum-three": (
        lambda x, p: torch.einsum("bi,ij,jk->bk", x, p.B, p.C),
        lambda x, p: x @ (p.B @ p.C),
    ),
    "einsum-between": (
        lambda x, p: torch.einsum("ab,bc,cd->ad", p.B[:, :3], x, p.C),
        lambda x, p: torch.einsum("ab,cd,bc->ad", p.B[:, :3], p.C, x),
    ),
    "einsum-alone": (lambda x, p: torch.einsum("ij->ji", x), lambda x, p: x.T),
    "einsum-sum": (lambda x, p: torch.einsum("ij->i", x), lambda x, p: x.sum(1)),
    "einsum-diagonal": (
        lambda x, p: torch.einsum("ii,ij->j", x[:, :3], p.A),
        lambda x, p: x[:, :3].diagonal() @ p.A,
    ),
    "einsum-ellipsis": (lambda x, p: torch.einsum("...i,ij", x, p.B), lambda x, p: x @ p.B),
    "bilinear": (
        lambda x, p: F.bilinear(x, p.v.expand(3, 4), p.W, p.v[:2]),
        lambda x, p: F.linear(x, p.W @ p.v, p.v[:2]),
    ),
    "multi-dot": (
        lambda x, p: torch.linalg.multi_dot([x, p.B, p.C]),
        lambda x, p: x @ (p.B @ p.C),
    ),
    "tensordot": (
        lambda x, p: torch.tensordot(x, p.B, dims=([1], [0])),
        lambda x, p: x @ p.B,
    ),
    "inner": (lambda x, p: torch.inner(x, p.A), lambda x, p: x @ p.A.T),
    "outer": (lambda x, p: torch.outer(x[0], p.v), lambda x, p: x[0][:, None] * p.v),
    "kron": (
        lambda x, p: torch.kron(x, p.A[:2]),
        lambda x, p: (x[:, None, :, None] * p.A[None, :2, None]).reshape(6, 16),
    ),
    "vecdot": (lambda x, p: torch.linalg.vecdot(x, p.v), lambda x, p: (x * p.v).sum(1)),
    "linear-of-a-product": (lambda x, p: F.linear(x, p.B @ p.C), lambda x, p: x @ (p.B @ p.C).T),
    "sparse": (
        lambda x, p: torch.sparse.mm(SPARSE[:, :3].to_sparse(), x),
        lambda x, p: SPARSE[:, :3] @ x,
    ),
    "sparse-moved": (
        lambda x, p: torch.sparse.mm(STORED.to(x.device), x),
        lambda x, p: STORED.to_dense() @ x,
    ),
    "lerp": (lambda x, p: torch.lerp(x, x.abs(), 0.3), lambda x, p: x * 0.7 + x.abs() * 0.3),
    "lerp-weights": (
        lambda x, p: torch.lerp(x, x.abs(), p.v),
        lambda x, p: x * (1 - p.v) + x.abs() * p.v,
    ),
    "true-divide": (lambda x, p: torch.true_divide(x, 2), lambda x, p: x * 0.5),
    "instance-norm": (
        _instance,
        lambda x, p: F.batch_norm(x, ONES * 0.3, ONES * 2, p.v, p.w),
    ),
}
HALVES = torch.tensor([[0, 1, 0, 1]]).expand(3, 4)


def _halves(x: Tensor, start: Any, included: bool = True) -> Tensor:
    filled = torch.tensor(start).double().expand(3, len(start))
    return filled.scatter_reduce(1, HALVES, x, "amax", include_self=included)


def _amax(x: Tensor) -> Tensor:
    return torch.stack([x[:, ::2].amax(1), x[:, 1::2].amax(1)], 1)


NEURONS: dict[str, tuple[Op, Op]] = {
    "clamp-open": (
        lambda x, p: x.clamp(
            torch.tensor([-1, 0, -INF, -2]).double(), torch.tensor([1, 3, 2, INF]).double()
        ),
        lambda x, p: torch.stack(
            [
                x[:, 0].clamp(-1, 1),
                x[:, 1].clamp(0, 3),
                x[:, 2].clamp(max=2),
                x[:, 3].clamp(min=-2),
            ],
            1,
        ),
    ),
    "scatter-amax-from-nothing": (lambda x, p: _halves(x, [-INF, -INF]), lambda x, p: _amax(x)),
    "scatter-amax-overwrites": (
        lambda x, p: _halves(x, [-INF, INF, 2.0], included=False),
        lambda x, p: F.pad(_amax(x), (0, 1), value=2.0),
    ),
    "index-fill-from-the-end": (
        lambda x, p: x.index_fill(1, torch.tensor([-1, 3, 0]), 2.0),
        lambda x, p: F.pad(x[:, 1:3], (1, 1), value=2.0),
    ),
    "join-nothing": (
        lambda x, p: torch.cat([torch.zeros(0), x, x.abs()], 1),
        lambda x, p: torch.cat([x, x.abs()], 1),
    ),
    "copysign": (
        lambda x, p: torch.copysign(x, torch.tensor([1.0, -0.0, 2, -3])),
        lambda x, p: x.abs() * torch.tensor([1.0, -1, 1, -1]),
    ),
    "matrix-norm": (
        lambda x, p: torch.linalg.matrix_norm(x, 1),
        lambda x, p: x.abs().sum(0).amax(),
    ),
    "matrix-norm-rows": (
        lambda x, p: torch.linalg.norm(x, -INF),
        lambda x, p: x.abs().sum(1).amin(),
    ),
    "norm-of-rows": (lambda x, p: torch.linalg.norm(x, 1, dim=1), lambda x, p: x.abs().sum(1)),
    "hardsigmoid": (lambda x, p: F.hardsigmoid(x), lambda x, p: F.relu6(x + 3) / 6),
    "threshold": (lambda x, p: F.threshold(x, 0.5, 0.5), lambda x, p: x.clamp(min=0.5)),
    "one-norm": (lambda x, p: x.norm(p=1, dim=1), lambda x, p: x.abs().sum(1)),
    "one-norm-of-all": (lambda x, p: torch.linalg.vector_norm(x, 1), lambda x, p: x.abs().sum()),
    "maximum-norm": (
        lambda x, p: torch.linalg.vector_norm(x, INF, 0, keepdim=True),
        lambda x, p: x.abs().amax(0, keepdim=True),
    ),
    "minimum-norm": (lambda x, p: x.norm(p=-INF, dim=1), lambda x, p: x.abs().amin(1)),
    "distance": (lambda x, p: torch.dist(x, p.A, 1), lambda x, p: (x - p.A).abs().sum()),
    "pairwise-distance": (
        lambda x, p: F.pairwise_distance(x, p.A, 1.0),
        lambda x, p: (x - p.A + 1e-6).abs().sum(1),
    ),
    "quantile": (
        lambda x, p: x.quantile(0.3, 1),
        lambda x, p: x.sort(1)[0][:, 0] * 0.1 + x.sort(1)[0][:, 1] * 0.9,
    ),
    "quantiles": (
        lambda x, p: x.quantile(torch.tensor([0.5, 1.0]).double(), 0),
        lambda x, p: torch.stack([x.median(0)[0], x.amax(0)]),
    ),
    "quantile-midpoint": (
        lambda x, p: x.quantile(0.3, 1, interpolation="midpoint"),
        lambda x, p: x.sort(1)[0][:, :2].mean(1),
    ),
    "topk-unsorted-sum": (
        lambda x, p: x.topk(2, 1, sorted=False)[0].sum(1),
        lambda x, p: x.topk(2, 1)[0].sum(1),
    ),
    "first-power": (lambda x, p: x**1, lambda x, p: x),
    "nan-to-num": (lambda x, p: x.nan_to_num(), lambda x, p: x),
    "meshgrid": (
        lambda x, p: torch.stack(torch.meshgrid(x[0], x[1], indexing="xy")),
        lambda x, p: torch.stack([x[0].expand(4, 4), x[1][:, None].expand(4, 4)]),
    ),
}


def _agree(op: Op, twin: Op, scored: bool) -> None:
    one, two = _made(op), _made(twin)
    x = torch.randn(1, 2, dtype=torch.float64)
    torch.testing.assert_close(one(x), two(x))
    found, wanted = (fxpath.analyze(model, (2,)) for model in (one, two))
    assert found.path_norm == pytest.approx(wanted.path_norm, rel=1e-11)
    if scored:
        names = dict(one.named_parameters()).keys()
        for key in names:
            torch.testing.assert_close(found.scores.get(key), wanted.scores.get(key))
        assert {key.partition(":")[0] for key in found.scores} <= names
    two_norms = [fxpath.path_norm(m, (2,), q=2, reduce=False) for m in (one, two)]
    assert two_norms[0] == pytest.approx(two_norms[1], rel=1e-11)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_products(name: str) -> None:
    _agree(*PRODUCTS[name], scored=name != "bilinear")


@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name: str) -> None:
    skip_what_torch_cannot_trace(name)
    _agree(*NEURONS[name], scored=True)
