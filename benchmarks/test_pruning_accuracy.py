"""The experiment trains what it says, goes on after a kill, and reports from its file alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxpath
from benchmarks import pruning_accuracy as experiment
from benchmarks import pruning_cells as cells
from benchmarks import pruning_masks as masks
from benchmarks import pruning_report as report
from benchmarks import stacked
from benchmarks.stacked import Recipe
from benchmarks.tasks import TASKS, Data, Task

# Networks trained together


@pytest.fixture(params=TASKS)
def networks(request: pytest.FixtureRequest) -> list[nn.Module]:
    """Three of one task, in float64, with batch norms that are not fresh."""
    torch.manual_seed(0)
    found = [TASKS[request.param].network().double() for _ in range(3)]
    for network in found:
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, 0.5 if "var" in name else -0.5, 1.5)
    return found


def inputs_of(network: nn.Module, count: int) -> Tensor:
    signals = isinstance(network[0], nn.Conv1d)  # type: ignore[index]
    return torch.randn(count, 1, *((64,) if signals else (8, 8)), dtype=torch.float64)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_a_stack_computes_what_its_networks_do(networks: list[nn.Module], mode: bool) -> None:
    inputs, state = inputs_of(networks[0], 7), stacked.stack(networks)
    outputs = stacked.run(networks[0], state, stacked._innermost(inputs), training=mode)
    for number, network in enumerate(networks):
        torch.testing.assert_close(outputs[number], network.train(mode)(inputs))
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point():
                torch.testing.assert_close(state[name][number], buffer)


@pytest.mark.parametrize("optimizer", stacked.OPTIMIZERS)
def test_a_stack_is_trained_as_its_networks_are(
    networks: list[nn.Module], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "BATCH", 8)
    inputs, recipe = inputs_of(networks[0], 20), Recipe(optimizer, 0.01, 3, seed=5)
    classes = torch.arange(20) % 10
    state = stacked.stack(networks)
    masks = {n: torch.rand_like(v) < 0.5 for n, v in state.items() if v.dim() > 2}
    stacked.train(networks[0], state, inputs, classes, recipe, [1, 2], masks)
    kind, options = stacked.OPTIMIZERS[optimizer]
    for number, network in enumerate(networks):
        pruned = {name: mask[number] for name, mask in masks.items()}
        alone = kind(network.parameters(), lr=0.01, **options)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(alone, T_max=9)
        for _ in range(3):
            alone.step()
            rates.step()
        for epoch in (1, 2):
            order = torch.Generator().manual_seed(5000 + epoch)
            for batch in torch.randperm(20, generator=order).split(8):
                for name, mask in pruned.items():
                    network.get_parameter(name).data.mul_(mask)
                alone.zero_grad()
                cross_entropy(network(inputs[batch]), classes[batch]).backward()
                alone.step()
                rates.step()
        for name, parameter in network.named_parameters():
            expected = parameter.detach() * pruned.get(name, 1)
            torch.testing.assert_close(state[name][number], expected, rtol=1e-6, atol=1e-9)


def test_recalibration_takes_the_statistics_of_all_examples(networks: list[nn.Module]) -> None:
    inputs, state = inputs_of(networks[0], 30), stacked.stack(networks)
    before = {name: value.clone() for name, value in state.items()}
    adapted = stacked.recalibrate(networks[0], state, inputs)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    for number, network in enumerate(networks):
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        network.train()(inputs)
        outputs = stacked.run(network, adapted, stacked._innermost(inputs[:4]), training=False)
        # A norm's average over one call, from its count of calls on.
        torch.testing.assert_close(outputs[number], network.eval()(inputs[:4]))


def test_no_stacked_form_is_an_error() -> None:
    network = nn.Sequential(nn.Tanh())
    with pytest.raises(TypeError, match=r"0\.: Tanh has no stacked form"):
        stacked.run(network, {}, torch.zeros(1, 1, 1, 1, 1), training=False)


# Data


@pytest.mark.parametrize("name", TASKS)
def test_data_are_the_same_at_every_call(name: str) -> None:
    task = TASKS[name]
    data = task.data()
    task.data.cache_clear()  # type: ignore[attr-defined]
    again = task.data()
    assert again is not data and torch.equal(again.test_inputs, data.test_inputs)
    classes = task.network()(data.test_inputs[:3]).shape[1]
    assert set(data.train_classes.tolist()) == set(range(classes))
    joined = torch.cat([data.train_inputs, data.test_inputs]).flatten(1)
    assert len(joined.unique(dim=0)) > 0.99 * len(joined)


# The sweep


def tiny_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(60) % 3
    inputs = torch.randn(60, 1, 4, 4, generator=generator) + classes[:, None, None, None]
    return Data(inputs[:40], classes[:40], inputs[40:], classes[40:])


def tiny_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


ALL = dict(masks.METHODS)
METHODS = ("magnitude", "canonical-layer", "obd")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of seconds; the file that its results go to."""
    task = Task("tiny", tiny_data, tiny_network, {"sgd": 0.1, "adamw": 0.01}, 3, True)
    monkeypatch.setitem(TASKS, "tiny", task)
    for name in set(masks.METHODS) - set(METHODS):
        monkeypatch.delitem(masks.METHODS, name)
    monkeypatch.setattr(experiment, "AMOUNTS", (0.2, 0.5))
    cells.prepare.cache_clear()
    return tmp_path / "out.json"


def sweep(path: Path, *more: str) -> list[dict[str, Any]]:
    argv = ["--tasks", "tiny", "--optimizers", "sgd", "--seeds", "2", "--json", str(path), *more]
    assert experiment.main(argv) == 0
    return json.loads(path.read_text())["rows"]


def test_the_sweep_goes_on_after_a_kill(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sweep(tiny.with_name("whole.json"))
    out, err = capsys.readouterr()
    assert "canonical magnitude / layer (*)" in out and "magnitude, rescaled" in out
    assert f"{2 * len(METHODS)}/{2 * len(METHODS)} cells" in err
    # Of two seeds, two methods that rescaling changes and one that it does not.
    assert len(rows) == 2 * (2 * 2 + 1)
    eligible = 4 * 9 + 5 * 16 + 3 * 5
    for row in rows:
        assert row["amounts"] == [0.2, 0.5]
        assert row["kept"] == [eligible - round(a * eligible) for a in row["amounts"]]
        assert all(0 < lost <= 1 for lost in row["lost"])
        for key in ("accuracy", "pruned", "recalibrated"):
            assert all(0 <= value <= 100 for value in row[key]) and len(row[key]) == 2
        assert (row["network"] == "both") == masks.METHODS[row["method"]].invariant
        assert row.get("ties", [0, 0]) == [0, 0]

    measure, calls = experiment.measure, 0

    def killed(*arguments: Any) -> list[cells.Row]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(experiment, "measure", killed)
    # Whatever is cached is gone with the process.
    cells.prepare.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny)
    assert json.loads(tiny.read_text())["rows"] == rows[: 5 + 2]
    cells.prepare.cache_clear()
    assert sweep(tiny) == rows and calls == 5 + 2
    assert sorted(path.name for path in tiny.parent.iterdir()) == [*("out.json", "whole.json")]
    # Nothing is left to do.
    assert sweep(tiny) == rows and calls == 7


def test_other_settings_are_another_file(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(METHODS) - {"magnitude"}:
        monkeypatch.delitem(masks.METHODS, name)
    before = sweep(tiny)
    kept = sorted(tiny.parent.iterdir())
    # Without a file to go on from, every number is found again and none is kept.
    argv = ["--tasks", "tiny", "--optimizers", "sgd", "--seeds", "1"]
    assert experiment.main(argv) == 0 and "magnitude, rescaled" in capsys.readouterr().out
    assert sorted(tiny.parent.iterdir()) == kept
    monkeypatch.setattr(experiment, "AMOUNTS", (0.3,))
    with pytest.raises(SystemExit):
        sweep(tiny)
    assert "has other amounts: name another file" in capsys.readouterr().err
    assert json.loads(tiny.read_text())["rows"] == before
    assert all(row["amounts"] == [0.3] for row in sweep(tiny, "--fresh"))


def test_a_mask_that_changes_is_an_error(tiny: Path) -> None:
    pruner, _ = cells.prepare("tiny", "sgd", 0).pruners
    method = masks.Method("Path-Mag", "path_magnitude")
    flat = torch.cat([s.flatten() for s in pruner.scores(method).values()]).sort().values
    (before,) = pruner.masks(method, [0.4])
    assert pruner.differing(method, before, before, "fault") == 0
    scores = pruner.scores(method)
    after = {name: kept.clone() for name, kept in before.items()}
    for name, kept in after.items():
        # The one at the threshold is swapped in.
        kept |= scores[name] == flat[round(0.4 * len(flat)) - 1]
    assert pruner.differing(method, before, after, "fault") == 1
    # A step's scores are not known.
    steps = masks.Method("in steps", "path_magnitude", steps=2)
    with pytest.raises(RuntimeError, match="fault: in steps differs in 1 entries"):
        pruner.differing(steps, before, after, "fault")
    for name, kept in after.items():
        kept |= scores[name] == flat[0]
    with pytest.raises(RuntimeError, match="fault: Path-Mag differs in 2 entries"):
        pruner.differing(method, before, after, "fault")


@pytest.mark.parametrize("name", masks.METHODS)
def test_masks_are_those_of_fxpath(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner, _ = cells.prepare("tiny", "sgd", 0).pruners
    method = ALL[name]
    (mask,) = pruner.masks(method, [0.3])
    assert sum(int((~kept).sum()) for kept in mask.values()) == round(0.3 * (36 + 80 + 15))
    assert pruner.compare(method, 0.3) == "same"
    assert pruner.compare(method, 1.0) == "refused"
    ((lost,), expected) = pruner.lost([mask]), copy.deepcopy(pruner.network)
    for parameter, kept in mask.items():
        expected.get_parameter(parameter).data *= kept
    metric = fxpath.path_metric(pruner.network, expected, (1, 4, 4))
    assert lost == pytest.approx(metric.relative, rel=1e-5)
    other = {n: ~kept for n, kept in mask.items()}
    monkeypatch.setattr(pruner, "masks", lambda *_: [other])
    with pytest.raises(RuntimeError, match=r"fxpath\.prune chooses otherwise"):
        pruner.compare(method, 0.3)


# The report


def row(method: str, seed: int, network: str, accuracy: float, **more: Any) -> dict[str, Any]:
    place = {"task": "t", "optimizer": "sgd", "seed": seed, "method": method, "network": network}
    columns = {"accuracy": [99.0, accuracy], "pruned": [50.0, 50.0], "lost": [0.125, 1.0]}
    return {**place, "amounts": [0.4, 0.8], "dense": 90.0 + seed, **columns, **more}


def test_tables_are_made_from_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for seed in (0, 1):
        rows.append(row("magnitude", seed, "original", 80.0 + 4 * seed))
        rows.append(row("magnitude", seed, "rescaled", 10.0))
        rows.append(row("path-mag", seed, "both", 70.0))
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(experiment, "titles", lambda: {"t": "T", **{m: m for m in masks.METHODS}})
    monkeypatch.delattr(experiment, "measure")
    monkeypatch.delattr(experiment, "prepare")
    plot = tmp_path / "plot.png"
    assert experiment.main(["--table-only", "--json", str(path), "--plot", str(plot)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    found = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["T, sgd: dense 90.5 ± 0.7 %, 2 seeds"] in found
    assert ["pruned", "40%", "80%"] in found
    assert ["magnitude", "99.0 ± 0.0", "82.0 ± 2.8"] in found
    assert ["magnitude, rescaled", "99.0 ± 0.0", "10.0 ± 0.0"] in found
    assert ["path-mag (*)", "99.0 ± 0.0", "70.0 ± 0.0"] in found
    assert ["path-mag (*)", "12.50 ± 0.00", "100.00 ± 0.00"] in found
    assert not any("recalibrated" in cell for line in found for cell in line)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiment.main(["--table-only", "--json", str(tmp_path / "no.json")])
    assert "no.json does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_one_seed_has_no_spread() -> None:
    assert report._spread([97.25], 1) == "97.2"
    assert report._spread([1.0, 3.0], 2) == "2.00 ± 1.41"
