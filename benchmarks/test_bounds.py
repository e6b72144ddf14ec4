"""The benchmark of bounds runs, and shows what it says: rescaling moves what is not invariant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bounds

INVARIANT = ("theorem_b1", "any_pair_normalized")


def test_invariant_columns_stay_and_the_others_grow() -> None:
    model, _ = bounds.prepare("mlp", "random")
    before, after = bounds.measure("mlp", "random", model, ["2-bit"])
    assert (before["rescaled"], after["rescaled"]) == (False, True)
    assert before["found"] == after["found"] > 0
    assert not before["exact"] and not after["exact"]
    for key in ("metric", "metric_lower", "path_norm"):
        assert after[key] == pytest.approx(before[key], rel=1e-9)
    common = before["bounds"].keys() & set(INVARIANT)
    assert common
    for name, value in {**before["bounds"], **before["rivals"]}.items():
        other = {**after["bounds"], **after["rivals"]}[name]
        assert min(value, other) >= before["found"]
        if name in common:
            assert other == pytest.approx(value, rel=1e-9)
        elif name in before["rivals"]:
            assert other > 1e6 * value


def test_pruning_is_exact() -> None:
    model, _ = bounds.prepare("lenet", "random")
    other = bounds.CHANGES["prune-10%"](model, (1, 28, 28))
    zeros = sum(int((p == 0).sum()) for p in other.parameters())
    assert zeros == round(0.1 * sum(p.numel() for p in model.parameters() if p.dim() > 1))
    one = bounds.CHANGES["prune-1"](model, (1, 28, 28))
    assert sum(int((p == 0).sum()) for p in one.parameters()) == 1
    assert not any(bool((p == 0).any()) for p in model.parameters())


def test_digits_are_learned() -> None:
    model, accuracy = bounds.prepare("mlp", "digits")
    assert accuracy > 0.85 and not model.training
    images, classes = bounds._digits((3, 16, 16))
    assert images.shape == (1797, 3, 16, 16) and len(classes) == 1797
    assert images.min() == -1 and images.max() == 1


@pytest.mark.slow
def test_bounds_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bounds.json"
    argv = ["--models", "mlp", "--weights", "random", "--changes", "prune-1", "4-bit"]
    with torch.random.fork_rng(devices=[]):
        assert bounds.main([*argv, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["change"], row["rescaled"]) for row in rows] == [
        (change, rescaled) for change in ("prune-1", "4-bit") for rescaled in (False, True)
    ]
    out = capsys.readouterr().out
    assert "any_pair_normalized" in out and "written to" in out
