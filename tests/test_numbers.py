"""Python numbers that forward reads, blocks of code, randomness and number formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxpath
from fxpath.capture import capture
from fxpath.model import Given
from tests.support.capturing import Net, norm, refused

Between = Callable[[Any, Tensor], Tensor]


def smooth(self: Any, h: Tensor) -> Tensor:
    return h.sigmoid()


READ: dict[str, tuple[float, Between]] = {
    "flag": (1, lambda self, h: h if self.n[0] else h.sigmoid()),
    "derived": (1, lambda self, h: h if (2 * self.n + 1).sum() > 3 else h.sigmoid()),
    "range": (2, lambda self, h: sum((h for _ in range(self.n[1])), torch.zeros(4))),
    "tolist": (2, lambda self, h: h * self.n.tolist()[1]),
    "item": (2, lambda self, h: h * self.n[1].item()),
    "float": (2, lambda self, h: h * float(self.n.max())),
    "unique": (2, lambda self, h: h * len(self.n.unique())),
    "nonzero": (2, lambda self, h: h * (self.n > 0).nonzero().numel()),
    "mask": (1, lambda self, h: h[:, torch.ones_like(self.mask) > 0]),
    "made here": (1, lambda self, h: h if torch.arange(3).sum() == 3 else h.sigmoid()),
    "written": (3, lambda self, h: h * float(torch.zeros(2).add_(self.n).sum())),
    "data": (1, lambda self, h: h.data),
    "unpacked": (2, lambda self, h: (lambda a, b: h * int(b))(*self.n)),
    "unpacked positions": (
        1,
        lambda self, h: torch.stack([h[:, i] for i in torch.cat([self.n - 1, self.n + 1])], 1),
    ),
    "narrow": (1, lambda self, h: h.narrow(1, self.n[0] - 1, 2 * self.n[1])),
    "slice": (1, lambda self, h: h[:, : 2 * self.n[1]]),
    "where": (1, lambda self, h: h[:, torch.where(self.mask > 0)[0]]),
    "arange": (1, lambda self, h: h[:, torch.arange(2 * self.n[1])]),
    "split": (1, lambda self, h: torch.cat(h.tensor_split(self.n[1], 1), 1)),
    "repeated": (
        1,
        lambda self, h: torch.cat([h[:, :2].repeat_interleave(self.n, 1)[:, :2], h[:, 2:]], 1),
    ),
    "formatted": (2, lambda self, h: h * {"n = 2": 2.0}[f"n = {self.n[1]}"]),
    "asserted": (1, lambda self, h: (torch._assert(self.n.sum() > 0, "empty"), h)[1]),
}


@pytest.mark.parametrize("name", READ)
def test_numbers_read_from_buffers(name: str) -> None:
    scale, between = READ[name]
    model = Net(between, n=torch.tensor([1, 2]), mask=torch.ones(4))
    assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(scale), rel=1e-6)
    assert fxpath.check(model, (3,))


def test_what_was_read_is_noted() -> None:
    model = Net(lambda self, h: h * self.n[1].item(), n=torch.tensor([1, 2]))
    captured = capture(model, Given((3,)))
    assert list(captured.baked) == ["n"] and captured.baked["n"].tolist() == [1, 2]
    assert type(captured.baked["n"]) is Tensor and captured.baked["n"] is not model.n
    # A tensor that is only a tensor in the graph is read anew.
    assert not capture(Net(lambda self, h: h * self.n, n=torch.ones(4)), Given((3,))).baked


def through_view(self: Any, h: Tensor) -> Tensor:
    made = torch.zeros(2)
    made[0:1].add_(1)
    return h * float(made.sum())


CONDITION = "data-dependent|cannot trace the model: Unsupported: Attempted to call"


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda self, h: h * self.a.bias[0].item(), "parameter a.bias is read as a Python number"),
        (lambda self, h: h if self.a.weight.max() > 0 else -h, "parameter a.weight is read"),
        (lambda self, h: h if h.sum() > 0 else -h, "depends on the values of activations"),
        (through_view, "forward itself has written to"),
        # torch 2.10 does not get as far as the values.
        (lambda self, h: torch.cond(h.sum() > 0, torch.neg, torch.abs, (h,)), CONDITION),
        (lambda self, h: h + torch.rand(4), "its result is random"),
        (lambda self, h: h + torch.randn_like(h), "its result is random"),
        (lambda self, h: h[:, torch.randperm(4)], "its result is random"),
        (lambda self, h: h + torch.empty(4), "never written to"),
        (lambda self, h: h + h.new_empty(4) * 0, "never written to"),
        (lambda self, h: h * (1 + 0j), "complex"),
        (lambda self, h: h.reshape(2, 2).fill_diagonal_(2.0).view(1, 4), "writes through a view"),
    ],
)
def test_reasons_are_true(between: Between, reason: str) -> None:
    problem = refused(Net(between))
    assert any(each in problem.reason for each in reason.split("|"))
    # The line of the function above, or the one of `forward` that calls it.
    here, called = (
        "test_numbers.py" in problem.source_line,
        "self.between(self" in problem.source_line,
    )
    assert here != called


def test_memory_that_is_overwritten_may_be_uninitialised() -> None:
    model = Net(lambda self, h: h * torch.empty(4).fill_(2.0))
    assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(2.0), rel=1e-6)


# -- blocks ----------------------------------------------------------------------------------------


def block(*contexts: Callable[[], Any]) -> Between:
    def between(self: Any, h: Tensor) -> Tensor:
        if not contexts:
            return h
        with contexts[0]():
            return block(*contexts[1:])(self, h * 2) / 2

    return between


def off() -> Any:
    return torch.autocast("cpu", enabled=False)


def half() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "between",
    [
        block(off),
        block(torch.enable_grad),
        block(torch.no_grad, torch.enable_grad, off),
        block(torch.inference_mode),
        block(lambda: torch.autocast("cuda", dtype=torch.float16)),
        lambda self, h: checkpoint(torch.relu, h, use_reentrant=False),
    ],
)
def test_blocks_that_change_nothing(between: Between) -> None:
    assert fxpath.path_norm(Net(between), (3,)) == pytest.approx(norm(), rel=1e-6)


def test_autocast_is_refused_where_it_rounds() -> None:
    problem = refused(Net(block(half)))
    assert "autocast" in problem.operation and "bfloat16" in problem.reason
    assert "capturing.py" in problem.source_line
    assert fxpath.path_norm(Net(block(half)).double(), (3,)) == pytest.approx(norm(), rel=1e-9)


# -- formats ---------------------------------------------------------------------------------------


def test_formats_without_a_path_norm_are_refused_by_name() -> None:
    complex_weights = nn.Linear(2, 3, dtype=torch.complex64)
    x = torch.zeros(1, 2, dtype=torch.complex64)
    sparse = nn.Linear(2, 3, bias=False)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    eighth = nn.Linear(2, 3)
    eighth.weight.data = eighth.weight.data.to(torch.float8_e4m3fn)
    for model, options, reason in (
        (complex_weights, {"example_inputs": x}, "complex"),
        (sparse, {"input_shape": (2,)}, "sparse"),
        (eighth, {"input_shape": (2,)}, "float8"),
    ):
        with pytest.raises(fxpath.UnsupportedModelError, match=reason) as caught:
            fxpath.path_norm(model, **options)  # type: ignore[arg-type]
        assert caught.value.report.problems[0].operation == "weight"
    mixed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())
    assert "torch.float32 and torch.float64 at once" in refused(mixed).reason


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f = nn.Linear(3, 4), torch.jit.script(nn.Sequential(nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.a(x))

    for model, path in ((torch.jit.script(nn.Linear(3, 2)), ""), (Part(), "f")):
        problem = refused(model)
        assert problem.module_path == path and "pass the nn.Module" in problem.remedy
