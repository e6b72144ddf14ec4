"""The benchmark of callbacks runs each loop, and tells steps with an evaluation from the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import callbacks
from benchmarks.callbacks import Clock, Images, measure


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
    )


def test_steps_of_both_kinds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device("cpu"))
    ends = iter([5.0, 8.0, 9.0, 12.0, 13.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(ends))
    monkeypatch.setitem(
        callbacks.LOOPS, "plain", lambda net, images, clock: [clock.tick() for _ in range(5)]
    )
    images = Images((3, 8, 8), 2, 5)
    row = measure("plain", tiny(), images, clock.where, every=50)
    assert row == {
        "loop": "plain",
        "step_ms": 1000,
        "step_with_evaluation_ms": 3000,
        "evaluation_in_steps": 2,
        "every": 50,
        "overhead_percent": 4,
    }


@pytest.mark.parametrize("loop", callbacks.LOOPS)
def test_loops_take_all_steps(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if loop in ("lightning", "transformers"):
        pytest.importorskip(loop)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(callbacks, "load_module", lambda name: tiny())
    argv = ["--loops", loop, "--batch", "2", "--size", "8", "--repeats", "2", "--json", "out.json"]
    seconds = []
    monkeypatch.setattr(
        Clock, "seconds", property(lambda self: seconds.append(len(self.ends)) or [2.0, 1.0])
    )
    assert callbacks.main([*argv, "--every", "10"]) == 0
    assert set(seconds) == {5}
    (row,) = json.loads(Path("out.json").read_text())["rows"]
    assert row["overhead_percent"] == 10 and loop in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]
