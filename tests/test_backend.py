"""fxpath as a backend of torch.compile: what it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break
from torch.utils.checkpoint import checkpoint

import fxpath
from fxpath.toolchain.backend import Part
from fxpath_backend import fxpath as backend
from tests.support.compiled import SHAPE, Net, analysed, seen, whole
from tests.support.nets import randomize

#: Dynamo looks at it wherever a graph begins with an activation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def assert_same(found: fxpath.Analysis, expected: fxpath.Analysis) -> None:
    assert found.path_norm == pytest.approx(expected.path_norm, rel=1e-6)
    assert found.scores.keys() == expected.scores.keys()
    for name, score in expected.scores.items():
        torch.testing.assert_close(found.scores[name], score)
    assert found.unscored == expected.unscored
    assert [row["name"] for row in found.layers] == [row["name"] for row in expected.layers]


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


class Taken(nn.Module):
    """Names that whatever holds its graph may have of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self._graph = nn.Linear(3, 3), nn.Linear(3, 3)
        self._order = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(self._graph(x) * self._order)


def test_names_that_fxpath_might_use_itself_are_the_model_s() -> None:
    model, x = randomize(Taken(), weights=True), torch.randn(1, 3)
    _, [part] = seen(model, x)
    assert_same(analysed(part), whole(model, x))
    assert {"graph.weight", "_graph.weight", "_order"} <= analysed(part).scores.keys()


def test_a_second_model_that_torch_does_not_compile_again_has_no_entry() -> None:
    parts: list[fxpath.toolchain.Part] = []
    options = {"inner": "eager", "callback": parts.append}
    for model in (nn.Linear(3, 2), nn.Linear(3, 2)):
        x = torch.randn(1, 3)
        found = torch.compile(model, backend=backend, options=options)(x)
        assert torch.equal(found, model(x))
    assert len(parts) == 1


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
