"""fxpath as a backend of torch.compile: it changes nothing, and refuses by name."""

from __future__ import annotations

import json
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import graph_break
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext

import fxpath
from fxpath.modes import TRACING
from fxpath.toolchain.backend import Options, Part
from fxpath_backend import fxpath as backend
from tests.support.compiled import SHAPE, Net, seen
from tests.support.nets import randomize

#: Dynamo looks at it wherever a graph begins with an activation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.usefixtures("fresh_compiler"),
]


# -- nothing else changes --------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [False, True])
def test_training_is_bit_for_bit_that_of_the_inner_backend(breaks: bool) -> None:
    def trained(how: Any, **more: Any) -> tuple[list[Tensor], Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = randomize(Net(breaks)).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        compiled = torch.compile(model, backend=how, **more)
        outputs = []
        for _ in range(2):
            y = compiled(torch.randn(SHAPE))
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
            outputs += [y.detach(), *(p.grad.clone() for p in model.parameters())]
        return [*outputs, *model.state_dict().values()], torch.get_rng_state()

    parts: list[Part] = []
    expected, rng = trained("aot_eager")
    found, rng_found = trained(backend, options={"inner": "aot_eager", "callback": parts.append})
    assert parts and all(part.report is None for part in parts)
    assert len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(rng, rng_found)


@pytest.mark.slow
def test_outputs_are_bit_for_bit_those_of_inductor() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    expected = torch.compile(model)(x)
    torch._dynamo.reset()
    found, [part] = seen(model, x, inner="inductor")
    assert torch.equal(found, expected) and part.analysis is not None


def _recording(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
    """Stands for an inner backend, and notes what it is given."""
    fakes = TracingContext.get().fake_mode.fake_tensor_converter.tensor_memo
    state = torch.is_grad_enabled(), len(fakes)
    GIVEN.append((graph_module, list(example_inputs), state))
    return graph_module.forward


GIVEN: list[tuple[fx.GraphModule, list[Any], tuple[bool, int]]] = []
torch._dynamo.register_backend(_recording, "fxpath_test_recording")


def test_the_inner_backend_gets_what_torch_captured() -> None:
    model, x = randomize(Net(breaks=False)).train(), torch.randn(SHAPE)
    GIVEN.clear()
    with torch.no_grad():
        torch.compile(model, backend="fxpath_test_recording")(x)
        torch._dynamo.reset()
        before = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
        seen(model, x, inner="fxpath_test_recording")
    (plain, plain_inputs, state), (handed, inputs, state_handed) = GIVEN
    assert handed.code == plain.code and state == state_handed
    assert [id(x) for x in inputs] == [id(x) for x in plain_inputs]
    for one, other in zip(handed.graph.nodes, plain.graph.nodes, strict=True):
        assert one.format_node() == other.format_node()
        assert one.meta.keys() == other.meta.keys()
        assert one.meta.get("stack_trace") == other.meta.get("stack_trace")
    after = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    # The pass itself has counted its batch once; kernels that write statistics leave no trace here.
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "batches" in name}
    assert all(after[name][1] == before[name][1] + 1 for name in changed)


def test_modes_and_generators_are_as_they_were_for_the_inner_backend() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.linear(x)
                graph_break()
                return F.dropout(y) + self.linear(x)

    model, x = Noisy(), torch.randn(2, 3)
    states: list[Any] = []

    def callback(part: Part | None) -> None:
        inference = torch.is_inference_mode_enabled()
        states.append((inference, torch.get_rng_state(), random.getstate()))

    GIVEN.clear()
    callback(None)
    with pytest.warns(UserWarning, match="aten.dropout.default .*: it was compiled in training"):
        seen(model, x, callback=callback, inner="fxpath_test_recording")
    assert len(states) == 3 and len({(inference, state) for inference, _, state in states}) == 1
    assert all(torch.equal(states[0][1], state) for _, state, _ in states)
    torch._dynamo.reset()
    torch.compile(model, backend="fxpath_test_recording")(x)
    handed = [state for _, _, state in GIVEN]
    assert len(handed) == 4 and handed[:2] == handed[2:]


def test_one_lock_is_held_while_dynamo_compiles() -> None:
    free: list[bool] = []

    def other() -> None:
        free.append(TRACING.acquire(blocking=False))

    def callback(part: Part) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    seen(nn.Linear(2, 2), torch.ones(1, 2), callback=callback)
    # With two locks, Dynamo in one thread and fxpath in another would wait for each other.
    assert free == [False]


# -- what is not supported -------------------------------------------------------------------------


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.gate = nn.Softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x)))


def test_an_unsupported_model_warns_once_and_runs(tmp_path: Path) -> None:
    model, x = Headed(), torch.randn(2, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, [part] = seen(model, x, report=tmp_path / "parts.json")
    assert torch.equal(y, model(x))
    [warning] = caught
    assert "aten.softmax.int (gate, " in str(warning.message) and __file__ in str(warning.message)
    [entry] = json.loads((tmp_path / "parts.json").read_text())["parts"]
    [problem] = entry["problems"]
    assert entry["status"] == "unsupported" and problem["module_path"] == "gate"
    assert problem["source_line"].endswith("return self.last(self.gate(self.first(x)))")


def test_an_unsupported_model_raises_by_name_if_asked_to() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"softmax\s+gate") as caught:
        seen(Headed(), torch.randn(2, 3), on_unsupported="raise")
    error = caught.value.inner_exception
    assert isinstance(error, fxpath.UnsupportedModelError)
    assert [problem.operation for problem in error.report.problems] == ["aten.softmax.int"]


def test_weights_without_a_path_norm_are_an_entry_or_an_error() -> None:
    model = nn.Linear(3, 2)
    model.weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinite entries in weight"):
        _, [part] = seen(model, torch.ones(1, 3))
    assert part.reason is not None and part.reason.startswith("ValueError: NaN or infinite")
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="NaN or infinite entries in weight"):
        seen(model, torch.ones(1, 3), on_unsupported="raise")


@pytest.mark.parametrize("error", [AssertionError("fault"), TypeError("fault")])
def test_faults_are_not_taken_for_refusals(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fxpath.toolchain.backend.analyze", broken)
    with pytest.raises(BackendCompilerFailed) as caught:
        seen(nn.Linear(3, 2), torch.ones(1, 3))
    assert caught.value.inner_exception is error


def test_what_a_callback_raises_comes_out() -> None:
    def callback(part: Part) -> None:
        raise LookupError(f"part {part.index}")

    with pytest.raises(BackendCompilerFailed, match="LookupError: part 0"):
        seen(nn.Linear(3, 2), torch.ones(1, 3), callback=callback)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reports": "x"}, "'reports' is not known: inner, report, on_unsupported, callback are"),
        ({"inner": "inductr"}, "inner='inductr': known are .*inductor"),
        ({"inner": "fxpath"}, "inner='fxpath': known are"),
        ({"on_unsupported": "ignore"}, "on_unsupported='ignore': known are 'warn', 'raise'"),
        ({"report": 3}, "report=3 is no path"),
        ({"report": "."}, "is a folder: name a file in it"),
        ({"callback": "f"}, "callback='f' cannot be called"),
    ],
)
def test_options_that_are_not_known_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Options.of(options)


@pytest.mark.parametrize(
    ("given", "message"), [({"options": {"q": 2}}, "'q' is not known"), ({"mode": "x"}, "'mode'")]
)
def test_they_are_errors_of_the_first_call(given: dict[str, Any], message: str) -> None:
    compiled = torch.compile(nn.Linear(3, 2), backend=backend, **given)
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(torch.ones(1, 3))


def test_fxpath_does_not_run_its_own_graphs_through_itself() -> None:
    with pytest.raises(ValueError, match="backend='fxpath' analyses what it compiles"):
        fxpath.compile(nn.Linear(3, 2), backend="fxpath")
