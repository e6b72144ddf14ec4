"""The benchmarks run, measure what they say, and write what they promise; no time is asserted."""

from __future__ import annotations

import copy
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from benchmarks import channels, criteria, growth, memory, timing
from benchmarks.recipe import SumPool2d, recipe
from fxpath import cli
from fxpath.capture.loading import UsageError

KEYS = {
    *("model", "params", "forward_ms", "magnitude_ms", "magnitude_out_ms"),
    *("path_norm_ms", "path_norm_compiled_ms", "path_magnitude_ms", "path_magnitude_compiled_ms"),
    *("obd_ms", "recipe_f64_ms", "recipe_f32_ms", "compile_cold_s", "compile_warm_s"),
}
BATCH_KEYS = {"forward_b128_ms", "obd_b128_ms"}
ENVIRONMENT = {
    *("date", "cpu", "instructions", "cores", "threads", "load"),
    *("platform", "python", "torch", "fxpath"),
}

NETS = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module `bench_nets`, as the current one."""
    (tmp_path / "bench_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_nets", raising=False)
    return tmp_path


def read(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The rows of a result, all of whose numbers are positive."""
    result = json.loads(path.read_text())
    assert set(result) == {"environment", "rows"}
    assert set(result["environment"]) == ENVIRONMENT
    for row in result["rows"]:
        assert set(row) == keys
        assert all(value > 0 for value in row.values() if not isinstance(value, str))
    return result["rows"]


# Timing


def test_cases_take_turns() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = timing.interleave(cases, repeats=2)
    assert list(medians) == ["a", "b"] and all(median > 0 for median in medians.values())
    # Once each before the first turn; then twice in a row, as both are short.
    assert "".join(calls) == "ab" + "aabb" * 2
    assert gc.isenabled()


def test_a_long_call_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(timing, "LONG", 0.0)
    timing.interleave({"a": lambda: calls.append(None)}, repeats=3)
    assert len(calls) == 1 + 3


def test_medians_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 9.0, 2.0])
    monkeypatch.setattr(timing, "_once", lambda case: next(seconds))
    assert timing.interleave({"a": lambda: None}, repeats=3) == {"a": 2000.0}


def test_environment() -> None:
    environment = timing.environment()
    assert set(environment) == ENVIRONMENT
    assert environment["fxpath"] == fxpath.__version__
    assert environment["cpu"] and environment["threads"] == torch.get_num_threads()
    json.dumps(environment)


def test_a_process_that_fails_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="benchmarks.compile_time no_such_model failed"):
        timing.fresh_process("benchmarks.compile_time", "no_such_model")
    assert "unknown model" in capfd.readouterr().err


# The baseline


def chain(pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        pool,
        nn.Conv2d(3, 2, 2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((2, 3), (3, 2), padding=(1, 0), ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
    ],
    ids=str,
)
def test_the_recipe_and_fxpath_agree(pool: nn.Module) -> None:
    model, shape = chain(pool), (2, 12, 11)
    before = copy.deepcopy(model.state_dict())
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        published = recipe(model, shape, dtype)
        analysis = fxpath.analyze(model, shape, dtype=dtype)
        assert published.path_norm == pytest.approx(analysis.path_norm, rel=rtol)
        assert published.scores.keys() == analysis.scores.keys()
        for name, score in published.scores.items():
            expected = analysis.path_magnitude(name)
            torch.testing.assert_close(score, expected, rtol=10 * rtol, atol=0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_recipe_covers_a_fresh_batch_norm_only() -> None:
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU())
    expected = fxpath.path_norm(model, (1, 5, 5), dtype=torch.float64)
    assert recipe(model, (1, 5, 5)).path_norm == pytest.approx(expected, rel=1e-9)
    norm.running_mean = torch.full((2,), 3.0)
    expected = fxpath.path_norm(model, (1, 5, 5), dtype=torch.float64)
    assert recipe(model, (1, 5, 5)).path_norm != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_sum_pooling_has_the_windows_of_max_pooling(ceil_mode: bool) -> None:
    for kernel, stride, dilation in ((2, 2, 1), (3, 2, 1), (3, 1, 1), (2, 3, 1), (2, 3, 2)):
        for padding in range(kernel // 2 + 1):
            pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
            for length in range(5, 9):
                # One entry at a time: a window's sum and its maximum are then equal.
                x = torch.eye(length).view(length, 1, length, 1).expand(-1, 2, -1, 6)
                columns = torch.zeros(6)
                columns[3] = 1
                torch.testing.assert_close(SumPool2d(pool)(x * columns), pool(x * columns))


def test_a_wrong_baseline_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    criteria._check_recipe("linear", model, (2,))
    monkeypatch.setattr(fxpath, "path_norm", lambda *_, **__: 1.0)
    with pytest.raises(RuntimeError, match="linear: the published recipe's path-norm is off"):
        criteria._check_recipe("linear", model, (2,))


# Table 3


def test_obd_in_parts_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "PART", 2)
    model = chain(nn.MaxPool2d(2)).double()
    batch = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.randint(0, 3, (5,))
    parts = criteria._obd_in_parts(model, batch)
    whole = fxpath.criteria.obd(model, criteria._sum_of_losses, batch)
    assert all(torch.allclose(parts[name], whole[name]) for name in whole)


def test_the_table() -> None:
    row: dict[str, Any] = {key: 10.0 for key in KEYS}
    row |= {"model": "alexnet", "params": 1234567, "forward_ms": 4.0, "path_magnitude_ms": 60.0}
    text = criteria.table(row)
    assert "1,234,567 parameters" in text and "after 200 evaluations" in text
    lines = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert lines["alexnet"] == ["ms", "/", "forward", "paper,", "ms"]
    assert lines["Path-Mag as published, float64"] == ["10.0", "2.50", "14"]
    assert lines["path-norm, eager"] == ["10.0", "2.50"]
    assert not any("batch 128" in line for line in lines)
    assert "batch 128" in criteria.table({**row, **dict.fromkeys(BATCH_KEYS, 1.0)})
    assert "paper" not in criteria.table({**row, "model": "other"})
    assert "never" in criteria.table({**row, "path_magnitude_ms": 5.0})


@pytest.mark.slow
def test_criteria_through_the_command_line(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--models", "bench_nets:tiny", "--repeats", "1", "--json", "out.json"]
    assert cli.main(argv) == 0
    (row,) = read(Path("out.json"), KEYS)
    assert row["model"] == "bench_nets:tiny"
    assert row["params"] == 2 * (27 + 1) + 3 * (2 + 1)
    out = capsys.readouterr().out
    assert "differ by" in out and "compiling takes" in out and "out.json" in out


def test_full_adds_the_large_batch(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return torch.zeros(len(inputs), 3)

    monkeypatch.setattr(criteria, "_forward", forward)
    monkeypatch.setattr(criteria, "_obd_in_parts", lambda _, batch: sizes.append(len(batch[1])))
    monkeypatch.setattr(criteria, "_check_recipe", lambda *_: None)
    monkeypatch.setattr(criteria, "_cases", lambda *_: {})
    monkeypatch.setattr(criteria, "_compile_seconds", lambda _: (1.0, 1.0))
    row = criteria.measure("bench_nets:tiny", repeats=1, full=True)
    assert set(row) >= BATCH_KEYS
    # The model is asked once for its number of classes.
    assert set(sizes) == {1, 128} and sizes.count(1) == 1


def test_bench_without_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fxpath, "__file__", str(tmp_path / "fxpath" / "__init__.py"))
    assert cli.main(["bench", "--full"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "python -m benchmarks.criteria" in err


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (criteria.main, lambda argv: cli.main(["bench", *argv])):
        with pytest.raises(SystemExit) as caught:
            main(["--models", "resnt18"])
        assert caught.value.code == 2
        assert "did you mean resnet18" in capsys.readouterr().err.splitlines()[-1]


# Memory and resolution


@pytest.mark.slow
def test_memory(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets / "bench_nets.py").write_text(
        "from torch import nn\ndef large():\n    return nn.Linear(3000, 1000)\n"
    )
    assert memory.main(["--models", "bench_nets:large", "--json", "out.json"]) == 0
    keys = {"model", "parameter_bytes"}
    keys |= {f"{s}_{unit}" for s in ("analyze", "recipe_f64") for unit in ("bytes", "multiple")}
    (row,) = read(Path("out.json"), keys)
    assert row["parameter_bytes"] == 4 * 3001 * 1000
    # Copy, gradient and product in float64 are six times the parameters; scores alone are one.
    assert row["recipe_f64_multiple"] > 5
    assert row["analyze_multiple"] > 1
    assert "bench_nets:large" in capsys.readouterr().out


def test_resolution_draws_and_prints(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import resolution

    rows = [
        {"model": m, "pixels": n, "forward_ms": n / 8, "path_magnitude_compiled_ms": 4.0}
        for m in ("one", "two")
        for n in (32, 64)
    ]
    resolution.plot(rows, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert resolution.table(rows).splitlines()[-1].split() == ["two", "64", "8.0", "4.0", "0.50"]


@pytest.mark.slow
def test_resolution(nets: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import resolution

    argv = ["--models", "bench_nets:tiny/0", "--sizes", "8", "16", "--repeats", "1"]
    assert resolution.main([*argv, "--json", "out.json", "--plot", "out.png"]) == 0
    rows = read(Path("out.json"), {"model", "pixels", "forward_ms", "path_magnitude_compiled_ms"})
    assert [(row["model"], row["pixels"]) for row in rows] == [
        ("bench_nets:tiny/0", 8),
        ("bench_nets:tiny/0", 16),
    ]
    assert Path("out.png").is_file()


# Growth


@pytest.mark.parametrize("case", ["mask", "sound"])
def test_growth_prints_a_row_for_each_size(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    growth.main([case, "500"])
    header, _, row = capsys.readouterr().out.strip().splitlines()
    assert "ms per node" in header and row.split()[:2] == [case, "500"]


def test_growth_has_sizes_for_every_case() -> None:
    assert growth.SIZES.keys() == growth.CASES.keys()


def test_channels(nets: Path) -> None:
    path = nets / "channels.json"
    assert (
        channels.main(["--models", "bench_nets:tiny", "--repeats", "1", "--json", str(path)]) == 0
    )
    keys = {"model", "amount", "before_ms", "after_ms", "path_norm_lost"}
    keys |= {f"{what}_{when}" for what in ("parameters", "macs") for when in ("before", "after")}
    (row,) = read(path, keys)
    assert row["parameters_after"] < row["parameters_before"]
