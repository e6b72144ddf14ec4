"""The benchmark of saved programs runs, and finds in each runtime what fxpath finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import toolchains


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["exported", "onnxruntime"])
def test_a_row(tool: str) -> None:
    if tool == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    row = toolchains.measure(model, tool, repeats=1)
    assert row["tool"] == tool and row["version"]
    assert row["deviation"] < 1e-5
    assert row["program_ms"] >= 0 and row["ratio"] > 0


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"tool": "exported", "ratio": 1.5}]
    monkeypatch.setattr(toolchains, "load_module", lambda name: nn.Identity())
    monkeypatch.setattr(toolchains, "measure", lambda model, tool, repeats: {**rows[0]})
    file = tmp_path / "out.json"
    assert toolchains.main(["some", "--tools", "exported", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["rows"] == [{"model": "some", **rows[0]}]
    assert "1.5" in capsys.readouterr().out
