"""The benchmarks of training and conditioning run, and write what they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from benchmarks import conditioning, training

NETS = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
"""


def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trained_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trained_nets", raising=False)
    # Compiling takes longer than all else here.
    monkeypatch.setattr(training, "WAYS", ("plain", "eager"))
    compiled = fxpath.compile
    monkeypatch.setattr(
        fxpath, "compile", lambda *args, **kw: compiled(*args, **{**kw, "backend": "eager"})
    )
    memory = {"plain": 10, "eager": 20}
    monkeypatch.setattr(training, "fresh_process", lambda *a: [memory[a[2]]])
    argv = ["--seeds", "2", "--epochs", "1", "--weight", "0.1", "--models", "trained_nets:tiny"]
    argv += ["--batch", "2", "--repeats", "1", "--json", "out.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_steps_table", lambda rows: "steps")
        assert training.main(argv) == 0
    *digits, step = json.loads(Path("out.json").read_text())["rows"]
    assert [(row["seed"], row["weight"]) for row in digits] == [(0, 0), (0, 0.1), (1, 0), (1, 0.1)]
    for plain, penalized in zip(digits[::2], digits[1::2], strict=True):
        assert penalized["log10_path_norm"] < plain["log10_path_norm"]
    for row in digits:
        assert row["penalty_rescaled"] == pytest.approx(row["penalty"], rel=1e-5)
        assert row["decay_rescaled"] > 1.5 * row["decay"]
    assert step["eager_ratio"] > 0 and step["eager_bytes"] == 20
    assert "accuracy" in capsys.readouterr().out


def test_one_step_moves_by_the_penalty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    monkeypatch.setattr(training, "load_module", lambda name: model)
    before = float(fxpath.analyze(model).log10_path_norm)
    torch.manual_seed(0)
    training.step_of("x", "eager", 2)()
    assert float(fxpath.analyze(model).log10_path_norm) != before


def test_conditioning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    buffers = [buffer.clone() for buffer in model.buffers()]
    found = conditioning.row("mine", model, (3,))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert found["path_conditioning"] <= min(found["before"], found["least_norm"]) + 1e-9
    for mode in ("eval", "train"):
        assert found[f"path_conditioning_{mode}_deviation"] < 1e-5
    assert conditioning._table([found]).splitlines()[-1].split()[0] == "mine"
    net = conditioning.UNet(2).eval()
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 16, 16)
