"""The benchmarks run, measure what they say, and write what they promise; no time is asserted."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import sys
import types
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from benchmarks import (
    channels,
    checkpoints,
    columns,
    coverage,
    criteria,
    growth,
    memory,
    operators,
    sharded,
    timing,
)
from benchmarks.recipe import SumPool2d, recipe
from fxpath.capture.loading import UsageError
from fxpath.program import backends
from fxpath.program.flat import Flat

BASELINES = ("magnitude", "magnitude_out", "obd", "recipe_f64", "recipe_f32")


def keys(columns: Sequence[str], full: bool = False) -> set[str]:
    """Of a row of the criteria with these columns."""
    programs = [f"{what}_{column}" for column in columns for what in criteria.WHAT]
    batches = [f"{case}_b128" for case in ("forward", "obd") if full]
    cases = ["forward", *BASELINES, *batches, *programs]
    found = {"model", "device", "params", "left_out"}
    found |= {f"{case}_{unit}" for case in cases for unit in ("ms", "ratio")}
    found |= {f"{case}_{what}" for case in programs for what in ("ready_s", "deviation")}
    compiling = {"capture_s", "compile_cold_s", "compile_warm_s"}
    return found | compiling if "inductor" in columns else found


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
        assert all(value > 0 for value in row.values() if not isinstance(value, str | dict))
    return result["rows"]


# Timing


def test_cases_take_turns() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = timing.interleave(cases, repeats=2)
    assert list(medians) == ["a", "b"] and all(median > 0 for median in medians.values())
    # Once each before the first turn; then in turns, so that each meets the other's caches.
    assert "".join(calls) == "ab" + "ab" * 2
    assert gc.isenabled()


def test_medians_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 9.0, 2.0])
    monkeypatch.setattr(timing, "_seconds", lambda case, where: next(seconds))
    assert timing.interleave({"a": lambda: None}, repeats=3) == {"a": 2000.0}


def test_a_device_is_waited_for_before_and_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda where: calls.append("wait"))
    timing.interleave({"a": lambda: calls.append("run")}, 2, torch.device("cuda"))
    assert calls == ["run", *["wait", "run", "wait"] * 2]


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        criteria.main(["--device", "nowhere"])
    assert "--device" in capsys.readouterr().err.splitlines()[-1]


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
    columns = ("eager", "inductor", "onnx")
    row: dict[str, Any] = {key: 10.0 for key in keys(columns)}
    row |= {"model": "alexnet", "params": 1234567, "device": "cpu", "compile_warm_s": 1.0}
    row |= {"path_magnitude_eager_ms": 60.0, "recipe_f64_ratio": 2.5, "path_norm_onnx_ratio": 0.5}
    text = criteria.table(row)
    assert "1,234,567 parameters" in text and "after 200 (20) evaluations" in text
    lines = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert lines["alexnet"] == ["ms", "/", "forward", "paper,", "ms"]
    assert lines["Path-Mag as published, float64"] == ["10.0", "2.50", "14"]
    assert lines["path-norm, ONNX Runtime"] == ["10.0", "0.50"]
    assert not any("batch 128" in line or "AOTInductor" in line for line in lines)
    assert "batch 128" in criteria.table({key: row.get(key, 1.0) for key in keys(columns, True)})
    assert "paper" not in criteria.table({**row, "model": "other"})
    assert "never" in criteria.table({**row, "path_magnitude_eager_ms": 5.0})
    del row["path_magnitude_eager_ms"]
    assert criteria.table(row).endswith("in 10.0 s (1.0 s with a warm cache)")


def test_criteria_eager(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--models", "bench_nets:tiny", "--repeats", "1", "--json", "out.json"]
    assert criteria.main([*argv, "--columns", "eager"]) == 0
    (row,) = read(Path("out.json"), keys(["eager"]))
    assert row["model"] == "bench_nets:tiny" and row["device"] == "cpu"
    assert row["params"] == 2 * (27 + 1) + 3 * (2 + 1)
    assert row["left_out"] == {}
    assert row["path_norm_eager_deviation"] < 1e-5 > row["path_magnitude_eager_deviation"]
    out = capsys.readouterr().out
    assert "differ by" in out and "out.json" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exported_programs_run() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, shape = chain(nn.MaxPool2d(2)).eval(), (2, 12, 11)
    way = columns.COLUMNS["onnx"][1](model, shape, True)
    way.run()
    found = way.found()
    assert found.scores.keys() == dict(model.named_parameters()).keys()
    assert columns.deviation(found, columns.expected(model, shape)) < 1e-5


@pytest.mark.long
def test_compiling_is_timed(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(nets))
    capture, compilation = timing.fresh_process("benchmarks.compile_time", "bench_nets:tiny")
    assert 0 < capture < compilation


def test_the_second_compilation_finds_the_cache_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches: list[set[str]] = []

    def process(module: str, *arguments: str, TORCHINDUCTOR_CACHE_DIR: str) -> list[float]:
        assert (module, *arguments) == ("benchmarks.compile_time", "alexnet", "cpu")
        caches.append({path.name for path in Path(TORCHINDUCTOR_CACHE_DIR).iterdir()})
        (Path(TORCHINDUCTOR_CACHE_DIR) / str(len(caches))).touch()
        return [1.0, 10.0 / len(caches)]

    monkeypatch.setattr(criteria, "fresh_process", process)
    found = criteria._compile_seconds("alexnet", timing.CPU)
    assert found == {"capture_s": 1.0, "compile_cold_s": 10.0, "compile_warm_s": 5.0}
    assert caches == [set(), {"1"}]


def test_a_column_that_fails_costs_no_other(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, shape: tuple[int, ...], scores: bool) -> columns.Way:
        if scores:
            raise ValueError("no scores\nhere")
        return columns.Way(lambda: None, lambda: columns.Found(1.0, {}))

    monkeypatch.setitem(columns.COLUMNS, "onnx", ("ONNX Runtime", wrong))
    row = criteria.measure("bench_nets:tiny", repeats=1, columns=["onnx", "eager"])
    assert set(row) == keys(["eager"])
    assert set(row["left_out"]) == {"path_norm_onnx", "path_magnitude_onnx"}
    assert row["left_out"]["path_norm_onnx"].startswith("RuntimeError: it is off by")
    assert row["left_out"]["path_magnitude_onnx"] == "ValueError: no scores"
    assert "Path-Mag, ONNX Runtime: left out: ValueError: no scores" in capsys.readouterr().out


def test_deviation() -> None:
    right = columns.Found(2.0, {"a": torch.tensor([0.5, 0.0]), "b": torch.zeros(2)})
    assert columns.deviation(right, right) == 0
    assert columns.deviation(columns.Found(3.0, {}), right) == pytest.approx(9)
    off = {"a": torch.tensor([0.5, 0.1])}
    assert columns.deviation(columns.Found(None, off), right) == pytest.approx(0.2)
    undefined = columns.Found(2.0, {"a": torch.full((2,), float("nan"))})
    assert not columns.deviation(undefined, right) < criteria.TOLERANCE


class FakeGraph:
    """Runs again what ran while it was captured, into the same tensors; keeps none of it alive."""

    run: Any
    found: dict[str, Any]

    def replay(self) -> None:
        run = self.run()
        assert run is not None, "what was recorded is gone"
        for name, value in run().items():
            if isinstance(value, Tensor):
                self.found[name].copy_(value)


@pytest.mark.parametrize("scores", [False, True])
def test_a_cuda_graph_is_recorded_and_replayed(
    monkeypatch: pytest.MonkeyPatch, scores: bool
) -> None:
    graph, model = FakeGraph(), chain(nn.MaxPool2d(2)).eval()
    aside = types.SimpleNamespace(wait_stream=lambda other: None)
    made = Flat.steps

    def steps(*args: Any) -> Any:
        run = made(*args)

        def step() -> dict[str, Any]:
            graph.run, graph.found = weakref.ref(run), run()
            return graph.found

        return step

    for name, fake in {
        "Stream": lambda: aside,
        "current_stream": lambda: aside,
        "stream": contextlib.nullcontext,
        "CUDAGraph": lambda: graph,
        "graph": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Flat, "steps", steps)
    way = columns.cudagraph(model, (2, 12, 11), scores)
    # A replay reads the weights as they are then.
    with torch.no_grad():
        model[0].weight *= 3
    way.run()
    found = way.found()
    assert set(found.scores) == (set(dict(model.named_parameters())) if scores else set())
    assert columns.deviation(found, columns.expected(model, (2, 12, 11))) < 1e-5


def test_a_graph_that_is_not_compiled_is_not_passed_off_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_can_generate", no_compiler)
    with pytest.raises(RuntimeWarning, match="no C.. compiler found"):
        columns.inductor(nn.Linear(2, 1), (2,), False)


def no_compiler() -> bool:
    warnings.warn("no C++ compiler found", RuntimeWarning, stacklevel=1)
    return False


def test_cuda_graphs_need_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        criteria.main(["--columns", "cudagraph"])
    assert "--device cuda" in capsys.readouterr().err


def test_full_adds_the_large_batch(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return torch.zeros(len(inputs), 3)

    monkeypatch.setattr(criteria, "_forward", forward)
    monkeypatch.setattr(criteria, "_obd_in_parts", lambda _, batch: sizes.append(len(batch[1])))
    monkeypatch.setattr(criteria, "_check_recipe", lambda *_: None)
    monkeypatch.setattr(criteria, "_time_columns", lambda *_: None)
    row = criteria.measure("bench_nets:tiny", repeats=1, full=True)
    assert set(row) == keys([], full=True)
    assert set(sizes) == {1, 128}


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        criteria.main(["--models", "resnt18"])
    assert caught.value.code == 2
    assert "did you mean resnet18" in capsys.readouterr().err.splitlines()[-1]


# Memory and resolution


@pytest.mark.long
def test_sharded(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--subjects", "norm", "--ranks", "2", "--layers", "4", "--width", "512"]
    assert sharded.main([*options, "--json", "out.json"]) == 0
    sizes = {"parameter_bytes", "layer_bytes", "extra_bytes", "extra_multiple", "extra_layers"}
    (row,) = read(Path("out.json"), sizes | {"subject", "ranks"})
    assert row["parameter_bytes"] == 4 * row["layer_bytes"] == 4 * 4 * 512**2
    assert row["extra_bytes"] > row["layer_bytes"]
    assert f"{row['extra_layers']:.1f}" in capsys.readouterr().out


@pytest.mark.long
def test_memory(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets / "bench_nets.py").write_text(
        "from torch import nn\ndef large():\n    return nn.Linear(3000, 1000)\n"
    )
    assert memory.main(["--models", "bench_nets:large", "--json", "out.json"]) == 0
    named = {"model", "parameter_bytes"}
    named |= {f"{s}_{unit}" for s in ("analyze", "recipe_f64") for unit in ("bytes", "multiple")}
    (row,) = read(Path("out.json"), named)
    assert row["parameter_bytes"] == 4 * 3001 * 1000
    # Copy, gradient and product in float64 are six times the parameters; scores alone are one.
    assert row["recipe_f64_multiple"] > 5
    assert row["analyze_multiple"] > 1
    assert "bench_nets:large" in capsys.readouterr().out


def test_resolution_draws_and_prints(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import resolution

    rows = [
        {"model": m, "pixels": n, "forward_ms": n / 8, "path_magnitude_ms": 4.0}
        for m in ("one", "two")
        for n in (32, 64)
    ]
    resolution.plot(rows, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert resolution.table(rows).splitlines()[-1].split() == ["two", "64", "8.0", "4.0", "0.50"]
    usual = {"model": "one", "pixels": 224, "forward_ms": 2.0, "path_magnitude_ms": 5.0}
    more = resolution.table(resolution.grown([usual, *rows])).splitlines()[-1]
    assert more.split() == ["two", "64", "8.0", "4.0", "0.50", "4.00", "0.80"]


@pytest.mark.slow
def test_resolution(nets: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import resolution

    argv = ["--models", "bench_nets:tiny/0", "--sizes", "8", "16", "--repeats", "1"]
    assert resolution.main([*argv, "--json", "out.json", "--plot", "out.png"]) == 0
    rows = read(Path("out.json"), {"model", "pixels", "forward_ms", "path_magnitude_ms"})
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


def test_checkpoints(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench_nets:tiny", "--count", "3", "--repeats", "1", "--json", "out.json"]
    assert checkpoints.main(argv) == 0
    (row,) = json.loads(Path("out.json").read_text())["rows"]
    assert {f"{case}_ms" for case in checkpoints.CASES} < row.keys()
    assert row["beyond_reading_ms"] == row["row_ms"] - row["read_ms"]
    assert "a row beyond reading" in capsys.readouterr().out


def test_growth_has_sizes_for_every_case() -> None:
    assert growth.SIZES.keys() == growth.CASES.keys()


def test_operators(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench_nets:tiny", "--json", "out.json"]
    counts = []
    for more in ([], ["--norm"]):
        assert operators.main([*argv, *more]) == 0
        (row,) = json.loads(Path("out.json").read_text())["rows"]
        assert all(name.startswith("aten.") for name in row["operators"])
        # Two weights and two biases are lifted, once each.
        assert row["operators"]["aten.abs.default"] == 4
        counts.append(sum(row["operators"].values()))
    assert counts[0] > counts[1]
    assert f"in all {counts[1]}" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_written_unless_it_is_told_where(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[Path, float]:
        folders = nets, Path(timing.__file__).parent
        found = [path for folder in folders for path in folder.rglob("*.*") if path.is_file()]
        return {path: path.stat().st_mtime for path in found if path.suffix != ".pyc"}

    before = files()
    assert operators.main(["bench_nets:tiny"]) == 0
    assert "written to" not in capsys.readouterr().out and files() == before
    # All of them take the file from the same option.
    assert timing.options("any", "", repeats=None).parse_args([]).json is None
    (nets / "out.json").touch()
    assert files().keys() - before.keys() == {nets / "out.json"}


def test_channels(nets: Path) -> None:
    path = nets / "channels.json"
    assert (
        channels.main(["--models", "bench_nets:tiny", "--repeats", "1", "--json", str(path)]) == 0
    )
    named = {"model", "amount", "before_ms", "after_ms", "path_norm_lost"}
    named |= {f"{what}_{when}" for what in ("parameters", "macs") for when in ("before", "after")}
    (row,) = read(path, named)
    assert row["parameters_after"] < row["parameters_before"]


def test_coverage_tells_three_kinds_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no such network")

    def ended(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 2, 3), *layers)

    made = {
        "relu": lambda: ended(nn.ReLU()),
        "gated": lambda: ended(nn.SiLU(), nn.Conv2d(2, 2, 1), nn.GLU(1)),
        "normalized": lambda: ended(nn.SiLU(), nn.GroupNorm(1, 2)),
        "broken": broken,
    }
    monkeypatch.setattr(coverage, "_torchvision", lambda: iter(made.items()))
    file = tmp_path / "coverage.json"
    assert coverage.main(["--json", str(file)]) == 0
    rows = {row["model"]: row for row in json.loads(file.read_text())["rows"]}
    assert [row["kind"] for row in rows.values()] == [*coverage.KINDS, "failed"]
    assert rows["gated"]["because"] == {"silu": 1, "glu": 1}
    assert rows["normalized"]["because"] == {"aten.group_norm.default": 1}
    assert "aten.group_norm.default" in capsys.readouterr().out
