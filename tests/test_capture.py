"""What is traced is what the user's model does, and nothing of the user's changes."""

from __future__ import annotations

import copy
import functools
import logging
import random
import threading
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from tests.support.capturing import Net, norm, refused

GLOBAL: dict[str, Tensor] = {}


GLOBAL_MODELS: dict[str, Any] = {}


class Reads(Net):
    """Reads what a hook of its first layer has kept."""

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(torch.relu(self.kept["a"]))


def keeper(model: Net) -> Callable[..., None]:
    return lambda module, args, output: model.kept.update(a=output)


class Keeper:
    def __init__(self, model: Net) -> None:
        self.model = model

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.model.kept["a"] = output

    def method(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.model.kept["a"] = output


@pytest.mark.parametrize(
    "make",
    [
        keeper,
        Keeper,
        lambda model: Keeper(model).method,
        lambda model: functools.partial(lambda kept, m, i, o: kept.update(a=o), model.kept),
        lambda model: lambda m, i, o, held=[model]: held[0].kept.update(a=o),  # noqa: B006
    ],
)
def test_hooks_that_reach_the_model_reach_its_copy(make: Callable[..., Any]) -> None:
    model = Reads()
    model.a.register_forward_hook(make(model))
    model(torch.randn(1, 3))
    before = model.kept["a"]
    for _ in range(2):
        assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(), rel=1e-6)
    assert model.kept["a"] is before


def test_a_hook_that_cannot_be_followed_is_refused_by_name() -> None:
    model = Reads()

    class Hidden:
        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
            model.kept["a"] = output

    model.a.register_forward_hook(Hidden())
    model(torch.randn(1, 3))
    before = model.kept["a"]
    problem = refused(model)
    assert problem.operation.endswith("Hidden") and problem.module_path == "a"
    assert "test_capture.py" in problem.source_line and "remove the hook" in problem.remedy
    assert model.kept["a"] is before


def test_containers_that_hooks_and_forward_fill_are_restored() -> None:
    kept: dict[str, Tensor] = {}
    seen: list[Tensor] = []
    last = None

    class Shared(Net):
        found: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            self.cache = x
            type(self).latest = x  # type: ignore[attr-defined]
            GLOBAL["x"] = x
            return self.b(torch.relu(kept["a"] + GLOBAL["a"] - self.found["a"]))

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal last
        last = output
        seen.append(output)
        for container in (kept, GLOBAL, Shared.found):
            container["a"] = output

    model = Shared()
    model.a.register_forward_hook(hook)
    # |a| + |a| + |a|: paths do not cancel.
    assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(3.0), rel=1e-6)
    assert last is None and not seen and not kept and not GLOBAL and not Shared.found
    assert not hasattr(model, "cache") and not hasattr(Shared, "latest")


class Store:
    """What holds the last activation, and is a hook itself."""

    last: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last = output


class Slot:
    __slots__ = ("last", "other")


STORE, SLOT, USER_DICT = Store(), Slot(), UserDict[str, Tensor]()


def fetch() -> Tensor:
    found: Tensor = STORE.last
    return found


def test_objects_that_hooks_fill_and_forward_reads_from_a_global() -> None:
    class Fetches(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            SLOT.other = USER_DICT["x"] = x
            return self.b(torch.relu(fetch() + SLOT.last))

    model = Fetches()
    model.a.register_forward_hook(STORE)
    model.a.register_forward_hook(lambda m, i, o: setattr(SLOT, "last", o))
    with torch.no_grad():  # so that nothing tells an old activation from a constant
        model(torch.randn(1, 3))
    before = STORE.last, SLOT.last
    del SLOT.other, USER_DICT["x"]
    assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(2.0), rel=1e-6)
    assert STORE.last is before[0] and SLOT.last is before[1]
    assert not hasattr(SLOT, "other") and not USER_DICT


def test_parameters_that_forward_reaches_by_a_global_have_scores() -> None:
    class Reaches(Net):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = GLOBAL_MODELS["model"].b(torch.relu(self.a(x)))
            return found

    model = GLOBAL_MODELS["model"] = Reaches()
    assert sorted(fxpath.analyze(model, (3,)).scores) == sorted(dict(model.named_parameters()))


def test_memoized_functions_keep_no_fake_tensor() -> None:
    @functools.lru_cache
    def ones(n: int) -> Tensor:
        return torch.ones(n)

    assert fxpath.path_norm(Net(lambda self, h: h * ones(4)), (3,)) == pytest.approx(norm())
    assert type(ones(4)) is Tensor


def test_hooks_that_return_something_count() -> None:
    model = Net()
    model.a.register_forward_hook(lambda module, args, output: output * 3)
    hidden = Net()
    hidden.a.weight.data *= 3
    hidden.a.bias.data *= 3
    expected = fxpath.path_norm(hidden, (3,))
    assert fxpath.path_norm(model, (3,)) == pytest.approx(expected)
    other = Net()
    other.b.register_forward_pre_hook(lambda m, args, kw: ((args[0] * 3,), kw), with_kwargs=True)
    assert fxpath.path_norm(other, (3,)) == pytest.approx(norm(3.0), rel=1e-6)


def test_statistics_of_activations_are_no_control_flow() -> None:
    model, stats = Net(), list[float]()
    model.a.register_forward_hook(lambda m, i, o: stats.append(float(o.mean())))
    model.a.register_forward_hook(lambda m, i, o: stats.extend(o.detach().numpy().ravel()))
    assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(), rel=1e-6)
    assert not stats


def raises_for_nan(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.isnan(output).any():
        raise RuntimeError("NaN")


def asserts(module: nn.Module, args: Any, output: Tensor) -> None:
    assert output.max() > 0, f"{output.mean():.3f}"


@pytest.mark.parametrize("hook", [raises_for_nan, asserts])
def test_hooks_that_check_activations_and_raise(hook: Any) -> None:
    model = Net()
    model.a.register_forward_hook(hook)
    assert fxpath.path_norm(model, (3,)) == pytest.approx(norm(), rel=1e-6)
    assert fxpath.check(model, (3,))


def doubles(module: nn.Module, args: Any, output: Tensor) -> None:
    if 1 < output.max() < 5:
        output.mul_(2)


@pytest.mark.parametrize("hook", [lambda m, i, o: o * 2 if 1 < o.max() < 5 else None, doubles])
def test_a_hook_that_may_change_what_it_looked_at_is_refused(hook: Any) -> None:
    model = Net()
    model.a.register_forward_hook(hook)
    assert "a hook reads values of activations" in refused(model).reason


def test_python_random_numbers() -> None:
    def drawn(self: Any, h: Tensor) -> Tensor:
        return h * random.uniform(1, 2)

    state = random.getstate()
    problem = refused(Net(drawn))
    assert "random" in problem.reason and state == random.getstate()
    # Layer drop draws first, and asks afterwards whether it is training.
    unused = Net(lambda self, h: h * 0 if random.random() < 0.5 and self.training else h)
    assert fxpath.path_norm(unused, (3,)) == pytest.approx(norm(), rel=1e-6)
    assert state == random.getstate()


@pytest.mark.parametrize("limit", [5.0, -5.0])
def test_a_hook_that_decides_by_activations_is_refused(limit: float) -> None:
    model = Net()
    model.a.register_forward_hook(lambda m, i, o: o * 2 if o.max() > limit else None)
    problem = refused(model)
    assert "a hook reads values of activations" in problem.reason and problem.module_path == "a"


def test_a_number_that_a_hook_leaves_for_forward_is_refused() -> None:
    class Scaled(Net):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * (self.scale if self.scale > 1 else 1.0))

    model = Scaled()
    model.a.register_forward_hook(lambda m, i, o: setattr(model, "scale", float(o.max())))
    assert "a hook reads values" in refused(model).reason


def test_what_cannot_be_copied_is_refused() -> None:
    model, lock = Net(), threading.Lock()
    model.a.register_forward_hook(lambda m, i, o: print(lock))
    problem = refused(model)
    assert "cannot be copied" in problem.reason and problem.module_path == "a"


def test_an_activation_of_an_earlier_pass_is_refused() -> None:
    model = Net(lambda self, h: h + self.left)
    model.left = model.a(torch.randn(1, 3))
    assert "in an earlier pass" in refused(model).reason
    assert isinstance(model.left, Tensor)


def test_a_replaced_forward_counts() -> None:
    model = Net()
    original = model.forward
    model.forward = lambda x: 7 * original(x)  # type: ignore[method-assign]
    assert fxpath.path_norm(model, (3,)) == pytest.approx(7 * norm(), rel=1e-6)


class Doubling(nn.DataParallel[nn.Module]):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 2


def test_data_parallel_wrappers_keep_what_is_theirs() -> None:
    assert fxpath.path_norm(Doubling(Net()), (3,)) == pytest.approx(2 * norm(), rel=1e-6)
    wrapped = nn.DataParallel(Net())
    wrapped.register_forward_hook(lambda m, i, o: o * 3)
    assert fxpath.path_norm(wrapped, (3,)) == pytest.approx(3 * norm(), rel=1e-6)
    inner = fxpath.path_norm(Net().a, (3,))
    for until in ("a", "module.a"):
        assert fxpath.path_norm(wrapped, (3,), until=until) == pytest.approx(inner)


# -- the cut ---------------------------------------------------------------------------------------


class Behind(Net):
    """Everything behind `b` is outside the theory or in place."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = super().forward(x)
        except Exception:
            y = x
        y *= 10
        y.sigmoid_()
        return y if y.sum() > 0 else -y


def test_until_stops_the_forward_pass() -> None:
    assert fxpath.path_norm(Behind(), (3,), until="b") == pytest.approx(norm(), rel=1e-6)
    assert fxpath.check(Behind(), (3,), until="b")
    assert "values of activations" in refused(Behind()).reason
    for name in ("a.c", "", "between"):
        with pytest.raises(ValueError, match="names no module"):
            fxpath.path_norm(Behind(), (3,), until=name)


def test_code_that_holds_up_the_cut_is_refused_by_name() -> None:
    class Catches(Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                h = self.a(x)
            except:  # noqa: E722
                h = x.new_ones(1, 4)
            return self.b(h)

    problem = refused(Catches(), until="a")
    assert "catches every exception" in problem.reason and "test_capture" in problem.source_line


def test_compiled_models_are_not_compiled() -> None:
    torch._dynamo.reset()
    model = torch.compile(Net(), backend=lambda graph, inputs: pytest.fail("compiled"))
    x = torch.zeros(2, 3)
    assert fxpath.path_norm(model, example_inputs=x) == pytest.approx(norm())
    assert fxpath.path_norm(model, example_inputs=x, until="b") == pytest.approx(norm())


def test_of_several_calls_the_last_one_counts() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.unused = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.relu(self.b(self.relu(self.a(x)))))

    assert fxpath.path_norm(Twice(), (3,), until="relu") == pytest.approx(norm(), rel=1e-6)
    with pytest.raises(ValueError, match="not called"):
        fxpath.path_norm(Twice(), (3,), until="unused")


# -- threads and the log ---------------------------------------------------------------------------


def test_threads_capture_one_after_the_other() -> None:
    model, found = Net(), list[Any]()

    def work() -> None:
        found.append(fxpath.path_norm(model, (3,)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4 and found[0] == pytest.approx(norm(), rel=1e-6)


def test_torch_logs_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Graph(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(6, 6) @ super().forward(x)

    with caplog.at_level(logging.WARNING):
        fxpath.path_norm(Graph(), example_inputs=(torch.randn(6, 3),))
        refused(Behind())
    assert not caplog.records and capfd.readouterr() == ("", "")
    # The user's own settings are left.
    assert not logging.getLogger("torch.fx").filters and not logging.root.manager.disable


def test_copies_are_independent_of_the_model() -> None:
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    fxpath.path_norm(model, (3,), until="b")
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.b._forward_hooks and "forward" not in vars(model)


def test_functional_dropout_in_training_mode_is_refused() -> None:
    assert "training mode" in refused(Net(lambda self, h: F.dropout(h, 0.5, True))).reason
