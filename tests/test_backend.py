"""fxpath as a backend of torch.compile: what it reports, and that it changes nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import graph_break
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch.utils.checkpoint import checkpoint

import fxpath
from fxpath.modes import TRACING
from fxpath.toolchain.backend import Options, Part
from fxpath_backend import fxpath as backend
from tests.support.nets import randomize


class Block(nn.Module):
    def __init__(self, channels: int, breaks: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.breaks:
            graph_break()
        return F.relu(self.norm(x))


class Net(nn.Module):
    """Two graph breaks if ``breaks``: one in a block, deep inside, one before the head."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(2, False), Block(4, breaks))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.body(x).mean((2, 3)))
        if self.breaks:
            graph_break()
        return self.head(x)


SHAPE = (3, 2, 5, 5)
#: Dynamo looks at it wherever a graph begins with an activation.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def seen(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, list[Part]]:
    """What a model compiled with fxpath gives, and the parts that it was compiled in."""
    parts: list[Part] = []
    options = {"inner": "eager", "callback": parts.append, **options}
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, options=options)
    return compiled(*args), parts


def analysed(part: Part) -> fxpath.Analysis:
    assert part.analysis is not None, part
    return part.analysis


def whole(model: nn.Module, *inputs: Tensor) -> fxpath.Analysis:
    return fxpath.analyze(model, example_inputs=inputs, batch_dim=None)


def assert_same(found: fxpath.Analysis, expected: fxpath.Analysis) -> None:
    assert found.path_norm == pytest.approx(expected.path_norm, rel=1e-6)
    assert found.scores.keys() == expected.scores.keys()
    for name, score in expected.scores.items():
        torch.testing.assert_close(found.scores[name], score)
    assert found.unscored == expected.unscored
    assert [row["name"] for row in found.layers] == [row["name"] for row in expected.layers]


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_model_is_one_part_with_the_names_and_numbers_of_analyze(training: bool) -> None:
    model = randomize(Net(breaks=False)).train(training)
    x = torch.randn(SHAPE)
    expected, single = whole(model, x), fxpath.path_norm(model, example_inputs=x)
    _, [part] = seen(model, x)
    assert_same(analysed(part), expected)
    assert "body.0.conv.weight" in analysed(part).scores
    assert part.inputs == {"x": SHAPE} and not part.dynamic and not part.numbers
    assert part.source_line.endswith("x = self.conv(x)")
    # A batch of three counts three times.
    assert analysed(part).path_norm == pytest.approx(3 * single, rel=1e-6)


class Middle(nn.Module):
    """From the break inside of the second block to the end of that block, cut by hand."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.body = net.body

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body[1].norm(x))


def test_parts_between_graph_breaks_are_those_cut_by_hand(tmp_path: Path) -> None:
    model = randomize(Net(breaks=True)).eval()
    x, report = torch.randn(SHAPE), tmp_path / "parts.json"
    _, parts = seen(model, x, report=report)
    inner = x.new_zeros(3, 4, 5, 5)
    block = model.body
    cut = [
        (whole(block[0], x), "body.0."),
        (whole(block[1].conv, inner), "body.1.conv."),
        (whole(Middle(model), inner), ""),
        (whole(model.head, torch.zeros(3, 4)), "head."),
    ]
    found = [part for part in parts if part.analysis is not None]
    assert len(found) == len(cut)
    for part, (expected, prefix) in zip(found, cut, strict=True):
        analysis = analysed(part)
        assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-6)
        assert analysis.scores.keys() == {prefix + name for name in expected.scores}
        for name, score in expected.scores.items():
            torch.testing.assert_close(analysis.scores[prefix + name], score)
    [rest] = [part for part in parts if part.analysis is None]
    assert rest.report is None and rest.reason is not None and "no parameters" in rest.reason

    written = json.loads(report.read_text())
    assert written["version"] == 1 and [entry["part"] for entry in written["parts"]] == [*range(5)]
    assert written["parts"] == [json.loads(json.dumps(part.to_dict())) for part in parts]
    assert [entry["status"] for entry in written["parts"]].count("analysed") == 4
    assert written["parts"][0]["layers"][0]["name"] == "body.0.conv"
    assert [path.name for path in tmp_path.iterdir()] == ["parts.json"]


def test_in_a_function_names_start_with_the_variable() -> None:
    weight, offset = nn.Parameter(torch.ones(2, 3)), torch.full((2,), 0.5)
    model = nn.Linear(3, 3)

    def step(model: nn.Module, pair: dict[str, Tensor]) -> Tensor:
        return F.linear(model(pair["a"]), weight) + pair["b"] * offset

    a, b = torch.randn(1, 3), torch.randn(1, 2)
    _, [part] = seen(step, model, {"a": a, "b": b})
    assert analysed(part).scores.keys() == {"model.weight", "model.bias", "weight"}
    assert part.inputs == {"pair_a": (1, 3), "pair_b": (1, 2)}
    # offset is a constant, and multiplies what comes in by b: a path from each of its two entries.
    mass = model.weight.abs().sum() + model.bias.abs().sum()
    by_hand = float(mass.detach()) * 2 + 2 * 0.5
    assert analysed(part).path_norm == pytest.approx(by_hand, rel=1e-6)


class Written(nn.Module):
    """The part in the middle returns nothing: it writes into what the part before has made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        graph_break()
        y.add_(self.second(y.clone()))
        graph_break()
        return y


def test_what_a_part_writes_into_counts_as_its_output() -> None:
    model, x = Written(), torch.randn(2, 3)
    y, parts = seen(model, x)
    assert torch.equal(y, model(x))
    # Six more paths: each entry of y to itself.
    expected = whole(model.second, x).path_norm + 6
    assert analysed(parts[1]).path_norm == pytest.approx(expected, rel=1e-6)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, x, use_reentrant=False))


def test_checkpointed_blocks_are_taken_in_as_what_they_compute() -> None:
    model, x = randomize(Checkpointed()).train(), torch.randn(4, 3)
    expected = whole(nn.Sequential(model.block, model.last), x)
    _, [part] = seen(model, x)
    assert analysed(part).path_norm == pytest.approx(expected.path_norm, rel=1e-6)
    assert "block.0.weight" in analysed(part).scores


def test_dynamic_shapes_are_analysed_with_the_lengths_at_hand() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.scale = 2.5

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).view(x.size(0) * 2) * self.scale

    model, parts = Scaled(), list[Part]()
    options = {"inner": "eager", "callback": parts.append}
    compiled = torch.compile(model, backend=backend, dynamic=True, options=options)
    for n in (4, 6):
        x = torch.randn(n, 3)
        assert torch.equal(compiled(x), model(x))
    [part] = parts  # compiled once
    assert part.inputs == {"x": (4, 3)} and 0 in part.dynamic["x"]
    assert part.numbers == {"scale": 2.5}
    expected = whole(model, torch.randn(4, 3))
    assert analysed(part).path_norm == pytest.approx(expected.path_norm, rel=1e-6)


def test_what_is_compiled_again_is_another_entry_and_a_reset_begins_anew(tmp_path: Path) -> None:
    model, report = nn.Linear(3, 2), tmp_path / "parts.json"
    options = {"inner": "eager", "report": str(report)}

    def entries() -> list[Any]:
        return json.loads(report.read_text())["parts"]

    compiled = torch.compile(model, backend=backend, dynamic=False, options=options)
    compiled(torch.ones(1, 3))
    compiled(torch.ones(1, 3))
    assert len(entries()) == 1
    compiled(torch.ones(2, 3))
    assert [entry["compile_id"] for entry in entries()] == ["0/0", "0/1"]
    # Options of its own, a report of its own.
    torch.compile(nn.Linear(2, 2), backend=backend, options={**options})(torch.ones(1, 2))
    assert [entry["part"] for entry in entries()] == [0]
    torch._dynamo.reset()
    compiled(torch.ones(1, 3))
    assert [entry["part"] for entry in entries()] == [0]


def test_what_has_nothing_to_analyse_says_why() -> None:
    def choose(x: Tensor) -> Tensor:
        y = x.argmax(1)
        graph_break()
        return y.float().softmax(0)

    with pytest.warns(UserWarning, match="softmax"):
        _, parts = seen(choose, torch.randn(2, 3))
    assert parts[0].reason == "it has no output of floating point"
    assert parts[1].report is not None and parts[1].to_dict()["status"] == "unsupported"


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


# -- the entry point -------------------------------------------------------------------------------


def test_torch_finds_the_backend_by_name_and_does_not_import_the_package() -> None:
    code = """
import sys, torch
assert "fxpath" in torch.compiler.list_backends()
torch.compile(torch.nn.Linear(2, 2), backend="fxpath", options={"inner": "eager"})
assert "fxpath_backend" in sys.modules and "fxpath" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
