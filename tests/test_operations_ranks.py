"""Order statistics: each output is a k-max-pooling neuron (Def. A.1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import maximum, minimum, ranks
from tests.support.capturing import skip_what_torch_cannot_trace

SHAPE = (4, 6)


def _group_sort(x: Tensor) -> Tensor:
    return x.unflatten(2, (3, 2)).sort(-1).values.flatten(2)


ORDERED = {
    "sort": lambda x: x.sort(1).values,
    "sort-descending": lambda x: torch.sort(x, 2, descending=True)[0],
    "sort-stable": lambda x: x.sort(dim=-1, stable=True)[0],
    "msort": lambda x: torch.msort(x.transpose(0, 1)).transpose(0, 1),
    "group-sort": _group_sort,
    "topk": lambda x: x.topk(3, 2).values,
    "topk-smallest": lambda x: x.topk(2, 1, largest=False)[0],
    "topk-unsorted-one": lambda x: x.topk(1, 1, sorted=False)[0],
    "kthvalue": lambda x: x.kthvalue(3, 2).values,
    "kthvalue-keepdim": lambda x: x.kthvalue(2, 1, keepdim=True)[0],
    "median-even": lambda x: x.median(1).values,
    "median-keepdim": lambda x: x.median(-1, keepdim=True)[0],
    "nanmedian": lambda x: x.nanmedian(2)[0],
    "median-of-all": lambda x: torch.stack([row.median()[None] for row in x.unbind()]),
    "quantile-lower": lambda x: x.quantile(0.3, 2, interpolation="lower"),
    "quantile-higher": lambda x: x.quantile(0.3, 1, interpolation="higher"),
    "quantile-nearest": lambda x: x.quantile(0.7, 2, keepdim=True, interpolation="nearest"),
}


@pytest.mark.parametrize(
    ("item", "layout"),
    parameters(case(name, SHAPE, ranks(op), layouts=("spatial",)) for name, op in ORDERED.items()),
)
def test_order_statistics(item: Case, layout: str) -> None:
    skip_what_torch_cannot_trace(item.id)
    check(item, layout)


CUMULATIVE = [
    case("cummax", SHAPE, maximum(lambda x: x.cummax(2).values)),
    case("cummin", SHAPE, minimum(lambda x: x.cummin(1)[0])),
    case("aminmax-low", SHAPE, minimum(lambda x: torch.aminmax(x, dim=2)[0])),
    case("aminmax-high", SHAPE, maximum(lambda x: torch.aminmax(x, dim=1, keepdim=True)[1])),
]


@pytest.mark.parametrize(("item", "layout"), parameters(CUMULATIVE))
def test_cumulative(item: Case, layout: str) -> None:
    check(item, layout)
