"""What a program remembers of its model, what its numbers hold, and how it is passed on."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath

# -- edits of the model after it was captured ------------------------------------------------------


class Edited(nn.Module):
    """Tensors of every kind that a forward method reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.k.weight = self.l.weight
        self.c = nn.Conv1d(1, 1, 2)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("order", torch.arange(4), persistent=False)
        self.register_buffer("factor", torch.full((4,), 2.0))
        self.plain = torch.ones(4)
        self.held = {"list": [nn.Parameter(torch.ones(4)), torch.ones(4)]}

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(self.mask, self.l(x), torch.zeros(()))[:, self.order] * self.plain
        h = h * self.factor * self.held["list"][0] + self.held["list"][1]
        return self.c(self.k(h)[:, None])


class Numbers(nn.Module):
    """Tensors that a forward method reads as Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(3, 4)
        self.register_buffer("size", torch.tensor(2))
        self.plain = torch.tensor(3.0)
        self.held = [torch.tensor(2.0)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)[:, : int(self.size)] * self.plain.item()
        return h * float(self.held[0])


NUMBERS: dict[str, tuple[Callable[[Numbers], Any], str]] = {
    "buffer": (lambda m: m.size.fill_(4), "size"),
    "attribute in place": (lambda m: m.plain.fill_(4), "plain"),
    "attribute replaced": (lambda m: setattr(m, "plain", torch.tensor(4.0)), "plain"),
    "item replaced": (lambda m: m.held.__setitem__(0, torch.tensor(4.0)), "held.0"),
}


def _replace(model: Edited, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, value)


READ_ANEW: dict[str, Callable[[Edited], Any]] = {
    "parameter in place": lambda m: m.l.bias.data.mul_(3),
    "parameter replaced": lambda m: _replace(m, "l.bias", nn.Parameter(torch.full((4,), 5.0))),
    "buffer in place": lambda m: m.factor.mul_(3),
    "plain attribute in place": lambda m: m.plain.mul_(9),
    "plain attribute replaced": lambda m: _replace(m, "plain", torch.full((4,), 9.0)),
    "parameter in a list in a dict": lambda m: m.held["list"][0].data.mul_(9),
    "item replaced": lambda m: m.held["list"].__setitem__(1, torch.full((4,), 7.0)),
    "module replaced by its like": lambda m: _replace(m, "c", nn.Conv1d(1, 1, 2)),
}
NOTICED: dict[str, tuple[Callable[[Edited], Any], str]] = {
    "mask": (lambda m: m.mask.fill_(True), "mask has other entries"),
    "mask through data": (lambda m: m.mask.data.fill_(True), "mask has other entries"),
    "positions": (lambda m: m.order.zero_(), "order has other entries"),
    "untied": (
        lambda m: _replace(m, "k.weight", nn.Parameter(torch.ones(4, 4))),
        r"(l|k).weight and (l|k).weight are no longer one tensor",
    ),
    "another shape": (
        lambda m: _replace(m, "l.bias", nn.Parameter(torch.ones(1))),
        r"l.bias has shape \(1,\)",
    ),
    "attribute gone": (lambda m: delattr(m, "plain"), "plain is gone"),
    "another kind of module": (lambda m: _replace(m, "c", nn.Identity()), "module c was Conv1d"),
    "another stride": (lambda m: _replace(m, "c", nn.Conv1d(1, 1, 2, stride=2)), "stride"),
    "hook": (
        lambda m: m.l.register_forward_hook(lambda _, i, o: 2 * o),
        "module l has other hooks",
    ),
    "pre-hook": (
        lambda m: m.c.register_forward_pre_hook(lambda _, i: (2 * i[0],)),
        "module c has other hooks",
    ),
    "forward": (lambda m: setattr(m.c, "forward", lambda x: 5 * x), "another forward"),
    "tied": (lambda m: _replace(m, "k.bias", m.l.bias), "became one tensor"),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.l, "weight"),
        "module l was Linear",
    ),
}


@pytest.mark.parametrize("edit", READ_ANEW)
def test_edits_are_read_anew(edit: str) -> None:
    model = Edited()
    program = fxpath.compile(model, (4,), backend="eager")
    before = program.path_norm()
    READ_ANEW[edit](model)
    assert program.path_norm() == pytest.approx(fxpath.path_norm(model, (4,)), rel=1e-6)
    assert program.path_norm() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("edit", NOTICED)
def test_edits_of_what_the_graph_was_made_for_are_noticed(edit: str) -> None:
    model = Edited()
    program = fxpath.compile(model, (4,), backend="eager")
    program.path_norm()
    change, named = NOTICED[edit]
    change(model)
    for call in (program.path_norm, program.scores, program.log_path_norm):
        with pytest.raises(ValueError, match=f"{named}.*compile again"):
            call()


@pytest.mark.parametrize("edit", NUMBERS)
def test_edits_of_what_was_read_as_a_number_are_noticed(edit: str) -> None:
    model = Numbers()
    program = fxpath.compile(model, (3,), backend="eager")
    weights = model.l.weight[:2].abs().sum() + model.l.bias[:2].abs().sum()
    assert program.path_norm() == pytest.approx(6 * weights.item(), rel=1e-6)
    change, named = NUMBERS[edit]
    change(model)
    with pytest.raises(ValueError, match=f"{named} has other entries"):
        program.path_norm()


# -- scores that float32 cannot hold ---------------------------------------------------------------


def blown_up() -> nn.Sequential:
    """A path-norm of about 1e64: the last bias has a share of 1e-65."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3e8)
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_small_shares_are_no_zeros(backend: str) -> None:
    model = blown_up()
    found = fxpath.compile(model, (64,), backend=backend).evaluate(scores=True)
    # The bias of an output neuron is a path of its own: its Path-Mag is its size.
    size = found.absolute("12.bias")
    torch.testing.assert_close(size.double(), model[12].bias.abs().double(), rtol=1e-4, atol=0)
    scores = found.shares
    assert scores["12.bias"].dtype == torch.float64 and scores["0.weight"].dtype == torch.float32
    wide = fxpath.analyze(copy.deepcopy(model).double(), (64,)).scores
    for name, share in scores.items():
        torch.testing.assert_close(share.double(), wide[name], rtol=1e-4, atol=0)


def test_dead_neurons_do_have_zeros() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    scores = fxpath.analyze(model, (3,)).scores
    assert all(share.dtype == torch.float32 for share in scores.values())
    assert scores["0.weight"][1].eq(0).all() and scores["0.weight"][0].gt(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absolute_values_whose_shares_are_below_float64(dtype: torch.dtype) -> None:
    """Along a chain of norm 1e400: Path-Mag of a bias is its size times what comes behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20))).to(dtype)
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e20)
    analysis = fxpath.analyze(model, (1,))
    assert analysis.log10_path_norm > 390
    for i in (19, 18, 10, 6):
        expected = model[i].bias.abs().double() * (1e20 ** (19 - i))
        found = analysis.path_magnitude(f"{i}.bias").double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_absolute_values_below_float32() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-30)
        model[1].weight.fill_(1e-30)
    found = fxpath.analyze(model, (2,)).path_magnitude("0.weight")
    torch.testing.assert_close(
        found, torch.full((2, 2), 1e-60, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_buffers_that_cannot_hold_the_scores() -> None:
    program = fxpath.compile(blown_up(), (64,), backend="eager")
    scores = program.scores()
    wide = {name: torch.empty_like(share) for name, share in scores.items()}
    assert program.scores(out=wide)["12.bias"] is wide["12.bias"]
    assert torch.equal(wide["12.bias"], scores["12.bias"])
    narrow = {name: torch.empty(share.shape) for name, share in scores.items()}
    with pytest.raises(ValueError, match=r"out\['\d+.bias'\] holds torch.float32.*torch.float64"):
        program.scores(out=narrow)


# -- buffers ---------------------------------------------------------------------------------------


def test_buffers_that_cannot_be_written_to() -> None:
    program = fxpath.compile(nn.Linear(2, 2), (2,), backend="eager")
    bias, size = torch.empty(2), (2, 2)
    with torch.inference_mode():
        inferred = torch.empty(size)
    for name, weight in {
        "several entries in one place": torch.zeros(3).as_strided(size, (1, 1)),
        "torch.sparse_coo": torch.zeros(size).to_sparse(),
        "the meta device": torch.empty(size, device="meta"),
        "inference mode": inferred,
    }.items():
        with pytest.raises(ValueError, match=name):
            program.scores(out={"weight": weight, "bias": bias})
    # Entries that lie across each other without meeting.
    across = torch.zeros(6).as_strided(size, (2, 3))
    found = program.scores(out={"weight": across, "bias": bias})
    torch.testing.assert_close(found["weight"], program.scores()["weight"])


def test_a_copy_that_was_made_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model.register_buffer("unused", torch.zeros(1))
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        assert fxpath.path_norm(copied, (2,)) == fxpath.path_norm(model, (2,))
    assert fxpath.path_norm(copied, (2,)) == fxpath.path_norm(model, (2,))


def test_buffers_share_no_memory() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    program = fxpath.compile(model, (2,), backend="eager")
    whole = torch.empty(12)
    weights, biases = ("0.weight", "1.weight"), ("0.bias", "1.bias")
    apart = {name: whole[4 * i : 4 * i + 4].view(2, 2) for i, name in enumerate(weights)}
    apart |= {name: whole[8 + 2 * i : 10 + 2 * i] for i, name in enumerate(biases)}
    for name, share in program.scores(out=dict(apart)).items():
        torch.testing.assert_close(share, program.scores()[name])
    cases: dict[str, dict[str, Tensor]] = {
        "the same": {"1.weight": apart["0.weight"]},
        "overlapping": {"1.weight": whole[2:6].view(2, 2)},
        "the parameter itself": {"0.weight": model[0].weight.detach()},
        "another parameter": {"0.bias": model[1].bias.detach()},
    }
    for name, change in cases.items():
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="shares memory with"):
            program.scores(out=apart | change)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), name
    with pytest.raises(ValueError, match="several entries in one place"):
        program.scores(out=apart | {"0.bias": torch.empty(1).expand(2)})


# -- exponents near 0 ------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.5, 0.01, 1e-3, 5e-4, 1e-5])
def test_roots_of_small_exponents(q: float) -> None:
    single = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        single.weight.fill_(2.0)
    assert fxpath.path_norm(single, (1,), q=q) == pytest.approx(2.0, rel=1e-9)
    several = nn.Linear(8, 4)
    analysis = fxpath.analyze(several, (8,), q=q)
    paths = torch.cat([p.detach().double().abs().flatten() for p in several.parameters()])
    log10 = float(paths.pow(q).sum().log10()) / q
    assert analysis.log10_path_norm == pytest.approx(log10, rel=1e-9)
    expected = 10**log10 if log10 < 308 else math.inf
    assert analysis.path_norm == pytest.approx(expected, rel=1e-6)


def test_exponents_that_float64_cannot_tell_from_0() -> None:
    with pytest.raises(ValueError, match="1e-320"):
        fxpath.path_norm(nn.Linear(1, 1), (1,), q=1e-320)


# -- gradients -------------------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def detached(w: Tensor) -> Tensor:
    return w + (w.sign() - w).detach()


class Computed(nn.Module):
    """A weight through a function, and an activation through another."""

    def __init__(self, function: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.o = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2, bias=False)
        self.function, self.behind = function, behind

    def effective(self) -> Tensor:
        return self.function(self.w) * 0.7

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.behind(F.linear(x, self.effective()))))


def test_a_backward_of_its_own_is_refused() -> None:
    model = Computed(Sign.apply, nn.Identity())
    program = fxpath.compile(model, (3,), backend="eager")
    assert program.path_norm() > 0
    with pytest.raises(fxpath.UnsupportedModelError, match="Sign computes.*backward"):
        program.log_path_norm()


@pytest.mark.parametrize("behind", [nn.Identity(), Halved.apply])
def test_a_straight_through_estimator_by_detach(behind: Any) -> None:
    model = Computed(detached, behind)
    fxpath.compile(model, (3,), backend="eager").log_path_norm().backward()
    assert model.w.grad is not None
    found = model.w.grad.clone()
    model.zero_grad()
    F.linear(
        F.linear(torch.ones(1, 3), model.effective().abs()), model.o.weight.abs()
    ).sum().log().backward()
    torch.testing.assert_close(found, model.w.grad)


# -- passing programs on ---------------------------------------------------------------------------


@pytest.mark.parametrize("passed_on", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_programs_are_copied_with_their_model(passed_on: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    program = fxpath.compile(model, (3,), backend="eager")
    before = program.path_norm()
    other = passed_on(program)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[0].bias.mul_(2)
    assert other.path_norm() == before != program.path_norm()
    assert other.scores().keys() == program.scores().keys()
    pair = passed_on({"model": model, "program": program})
    pair["model"][2].weight.data.zero_()
    expected = fxpath.path_norm(pair["model"], (3,))
    assert pair["program"].path_norm() == pytest.approx(expected)


def test_programs_of_exported_programs_say_why_they_do_not_pickle() -> None:
    exported = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    program = fxpath.compile(exported, backend="eager")
    with pytest.raises(TypeError, match=r"torch\.export\.save"):
        pickle.dumps(program)
    assert copy.deepcopy(program).path_norm() == program.path_norm()


def test_threads_share_a_cold_program() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    program = fxpath.compile(model, (3, 8, 8), backend="eager")
    found: list[float] = []

    def run() -> None:
        found.append(float(program.scores()["0.weight"].sum()))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and set(found) == {float(program.scores()["0.weight"].sum())}
