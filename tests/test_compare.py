"""Many checkpoints of one model: rows, refused files, and what a table on disk keeps."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxpath
from fxpath.checkpoints import reading, series
from fxpath.pairs import common
from fxpath.pairs.common import Effective

State = dict[str, Tensor]


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(4, 3)),
    ).eval()


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def moved(state: State, seed: int, size: float = 0.1) -> State:
    """Weights some steps of training later."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + size * torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }


def saved(folder: Path, states: list[State]) -> list[str]:
    files = [str(folder / f"{i}.pt") for i in range(len(states))]
    for file, state in zip(files, states, strict=True):
        torch.save(state, file)
    return files


def steps(model: nn.Module, count: int) -> list[State]:
    states = [copy.deepcopy(model.state_dict())]
    for seed in range(1, count):
        states.append(moved(states[-1], seed, 0.3 / seed))
    return states


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Five checkpoints of the dense network."""
    return saved(tmp_path, steps(dense(), 5))


def numbers(comparison: fxpath.Comparison) -> list[dict[str, object]]:
    """Rows without what tells files apart."""
    apart = ("file", "previous", "stamp", "setting")
    return [{k: v for k, v in row.items() if k not in apart} for row in comparison.rows]


# -- what a row says -------------------------------------------------------------------------------


def test_rows_are_what_the_other_verbs_say_of_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape = convolutional(), (2, 8, 8)
    states = steps(model, 3)
    before = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(common, "PathMetric", None)  # nothing is carried for ordinary changes
        rows = fxpath.compare(model, saved(tmp_path, states), shape, radius=0.5).rows
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    for name, here, there in (("reference", 1, 0), ("reference", 2, 0), ("previous", 2, 1)):
        model.load_state_dict(states[there])
        row = {k.removeprefix(f"{name}_"): v for k, v in rows[here].items()}
        metric = fxpath.path_metric(model, states[here], shape)
        log10 = math.log10(metric.other_path_norm)
        assert row["log10_path_norm"] == pytest.approx(log10, rel=1e-12)
        assert row["kind"] == "at most" and not metric.exact
        assert row["metric"] == pytest.approx(metric.bound("m"), rel=1e-9)
        assert row["metric"] > metric.lower
        assert row["relative"] == pytest.approx(row["metric"] / metric.path_norm, rel=1e-9)
    bounds = fxpath.lipschitz_bound(model, states[2], shape).bounds
    assert rows[2]["previous_bound"] == pytest.approx(bounds["any_pair"], rel=1e-9)
    norm = fxpath.analyze(model, shape, dtype=torch.float64).log10_path_norm
    assert rows[1]["log10_path_norm"] == pytest.approx(norm, rel=1e-12)
    assert {k: v for k, v in rows[1].items() if k.startswith("reference")} == {
        k.replace("previous", "reference"): v
        for k, v in rows[1].items()
        if k.startswith("previous_")
    }
    first = rows[0]
    assert (first["reference_metric"], first["reference_kind"]) == (0.0, "exact")
    assert first["previous"] is first["previous_metric"] is first["changed"] is None


class Mixed(nn.Module):
    """Transposed and shared weights, a norm by itself, a computed weight, and slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 3, groups=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.slope = nn.PReLU()
        self.twice = nn.Linear(4, 4)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](self.slope(self.norms[0](self.up(x))).relu())
        x = self.twice(self.twice(x.mean((2, 3))).relu()).relu()
        return self.last(x)


def test_every_kind_of_coordinate_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, shape = Mixed().eval(), (2, 4, 4)
    start = model.state_dict()
    later = {**moved(start, 1, 0.3), "slope.weight": start["slope.weight"]}
    row = fxpath.compare(model, saved(tmp_path, [start, later]), shape).rows[1]
    metric = fxpath.path_metric(model, later, shape)
    assert row["log10_path_norm"] == pytest.approx(math.log10(metric.other_path_norm), rel=1e-12)
    assert row["reference_metric"] == pytest.approx(metric.bound("m"), rel=1e-9)
    assert row["reference_kind"] == "at most" and not metric.signs_agree


def test_outputs_are_bounded_for_a_larger_radius(run: list[str]) -> None:
    found = fxpath.compare(dense(), run[:2], radius=3.0).rows[1]
    ours, theirs = dense(), dense()
    theirs.load_state_dict(torch.load(run[1]))
    assert found["reference_bound"] == 3 * found["reference_metric"]
    x = 6 * torch.rand(200, 3) - 3
    assert (ours(x) - theirs(x)).abs().sum(1).max() <= found["reference_bound"]
    assert found["reference_bound"] >= fxpath.lipschitz_bound(ours, theirs, radius=3.0).value


def test_the_metric_is_exact_where_one_network_dominates(tmp_path: Path) -> None:
    model = dense().double()
    pruned = copy.deepcopy(model)
    pruned[0].weight.data[0, 1] = pruned[2].weight.data[1, 2] = 0
    # Rescaled by a power of two: no entry by entry domination, but one on every path.
    other = copy.deepcopy(pruned)
    other[0].weight.data[1] *= 4
    other[0].bias.data[1] *= 4
    other[2].weight.data[:, 1] /= 4
    files = saved(tmp_path, [m.state_dict() for m in (model, pruned, other)])
    found = fxpath.compare(model, files).rows
    value = fxpath.path_metric(model, pruned).value
    assert [row["reference_kind"] for row in found] == ["exact"] * 3
    assert found[1]["reference_metric"] == value
    assert found[2]["reference_metric"] == pytest.approx(value, rel=1e-9)
    assert found[2]["previous_metric"] == 0
    assert found[1]["changed"] in ("0.weight", "2.weight")


def test_a_change_that_cancels_is_carried(tmp_path: Path) -> None:
    model = dense().double()
    state = moved(model.state_dict(), 1, 1e-13)
    state["0.weight"][0, 0] *= -1
    state["0.weight"][0, 0] *= 1e-300
    start = {**model.state_dict(), "0.weight": model.state_dict()["0.weight"].clone()}
    start["0.weight"][0, 0] = -state["0.weight"][0, 0]
    (_, row) = fxpath.compare(model, saved(tmp_path, [start, state])).rows
    model.load_state_dict(start)
    metric = fxpath.path_metric(model, state)
    assert not metric.exact and metric.relative_upper < 1e-11
    assert row["reference_metric"] == pytest.approx(metric.bound("m"), rel=1e-9)


def test_slopes_that_differ_leave_a_bound(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 1))
    state = {**model.state_dict(), "1.weight": torch.tensor([0.5])}
    (_, row) = fxpath.compare(model, saved(tmp_path, [model.state_dict(), state])).rows
    assert row["reference_metric"] is row["reference_relative"] is row["reference_kind"] is None
    assert row["reference_bound"] == fxpath.lipschitz_bound(model, state).value > 0


def test_norms_beyond_float64_are_compared(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(4))).double()
    sizes = (torch.tensor([[each]], dtype=torch.float64) for each in (1e90, -2e90))
    states = [dict.fromkeys(model.state_dict(), size) for size in sizes]
    (_, row) = fxpath.compare(model, saved(tmp_path, states)).rows
    assert row["log10_path_norm"] == pytest.approx(360 + math.log10(16))
    assert row["reference_metric"] == math.inf and row["reference_relative"] == pytest.approx(17)


def test_the_layers_that_changed_most_come_first(tmp_path: Path) -> None:
    model = dense()
    state = copy.deepcopy(model.state_dict())
    state["2.bias"] *= 2
    state["0.weight"] *= -1
    row = fxpath.compare(model, saved(tmp_path, [model.state_dict(), state])).rows[1]
    assert row["changes"] == "0.weight 2; 2.bias 0.5" and row["changed"] == "0.weight"
    assert row["change"] == pytest.approx(2)


def test_at_most_three_sets_of_weights_are_in_memory(run: list[str]) -> None:
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(isinstance(each, Effective) for each in gc.get_objects()))

    fxpath.compare(dense(), run, progress=count)
    assert most == 3


# -- files -----------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_row(tmp_path: Path) -> None:
    states = steps(dense(), 2)
    files = saved(tmp_path, states)
    first, state = files[0], states[1]
    for name, content in {"a.pth": {"epoch": 3, "net": state}, "a.bin": state}.items():
        torch.save(content, tmp_path / name)
    save_file(state, tmp_path / "a.safetensors")
    shards = {"0": "one.safetensors", "2": "two.safetensors"}
    for layer, shard in shards.items():
        part = {name: value for name, value in state.items() if name.startswith(layer)}
        save_file(part, tmp_path / shard)
    listed = {"weight_map": {name: shards[name[0]] for name in state}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(listed))
    kinds = ["a.pth", "a.bin", "a.safetensors", "a.safetensors.index.json"]
    found = fxpath.compare(dense(), [*files, *(str(tmp_path / kind) for kind in kinds)])
    assert found.reference == first and not found.refused
    rows = numbers(found)
    keys = ["log10_path_norm", "reference_metric", "reference_relative", "reference_bound"]
    assert all(row[key] == rows[1][key] for row in rows[2:] for key in keys)
    assert [row["previous_metric"] for row in rows[2:]] == [0.0] * 4


def spoilt(folder: Path) -> dict[str, str]:
    """Files that are no checkpoints of the dense network, and what is said of each."""
    good = dense().state_dict()
    wrong = {
        "missing": ({k: v for k, v in good.items() if k != "2.bias"}, "2.bias"),
        "unexpected": ({**good, "4.weight": torch.ones(2)}, "4.weight"),
        "shape": ({**good, "2.bias": torch.ones(3)}, "2.bias"),
        "nan": ({**good, "2.bias": torch.tensor([0.0, math.nan])}, "2.bias"),
    }
    for name, (state, _) in wrong.items():
        torch.save(state, folder / f"{name}.pt")
    (folder / "damaged.pt").write_text("no weights")
    (folder / "shards.index.json").write_text(json.dumps({"weight_map": {"0.bias": "none"}}))
    said = {f"{name}.pt": what for name, (_, what) in wrong.items()}
    others = {"damaged.pt": "cannot be read", "absent.pt": "no such file"}
    return {**said, **others, "shards.index.json": "none beside it"}


def test_files_that_do_not_fit_are_named_and_the_others_stay(run: list[str]) -> None:
    folder = Path(run[0]).parent
    wrong = {str(folder / name): said for name, said in spoilt(folder).items()}
    found = fxpath.compare(dense(), [run[0], run[1], *wrong, run[2]])
    assert found.refused.keys() == wrong.keys()
    for file, said in wrong.items():
        assert file in found.refused[file] and said in found.refused[file]
    assert [row["file"] for row in found.rows] == run[:3]
    assert found.rows[2]["previous"] == run[1]
    assert numbers(found) == numbers(fxpath.compare(dense(), run[:3]))
    assert "refused" in repr(found) and all(file in str(found) for file in wrong)


def test_a_reference_that_does_not_fit_ends_it(run: list[str]) -> None:
    with pytest.raises(ValueError, match="reference is refused.*nowhere.pt: no such file"):
        fxpath.compare(dense(), run, reference="nowhere.pt")
    with pytest.raises(ValueError, match="no checkpoints"):
        fxpath.compare(dense(), [])
    with pytest.raises(ValueError, match="radius=-1"):
        fxpath.compare(dense(), run, radius=-1)


def test_a_mask_that_differs_is_another_architecture(tmp_path: Path) -> None:
    class Picks(nn.Module):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("at", torch.tensor([at]))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)[:, self.at]

    files = saved(tmp_path, [Picks(0).state_dict(), Picks(1).state_dict()])
    found = fxpath.compare(Picks(0), files)
    assert len(found.rows) == 1 and "another architecture" in found.refused[files[1]]


# -- the table on disk -----------------------------------------------------------------------------


class Stopped(Exception):
    """The end of a run that was not asked for."""


def stop_after(count: int) -> Callable[[int, int, str], None]:
    def progress(done: int, *_: object) -> None:
        if done == count:
            raise Stopped

    return progress


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are read, in order."""
    found: list[str] = []

    def noted(captured: object, file: str, *rest: object) -> object:
        found.append(Path(file).name)
        return reading.read(captured, file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(series, "read", noted)
    return found


@pytest.mark.parametrize("torn", ["", "whole", "half"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    run: list[str], read: list[str], tmp_path: Path, torn: str
) -> None:
    whole, table = tmp_path / "whole.csv", tmp_path / "out.csv"
    fxpath.compare(dense(), run, csv=whole)
    with pytest.raises(Stopped):
        fxpath.compare(dense(), run, csv=table, progress=stop_after(2))
    assert len(table.read_text().splitlines()) == 3
    lines = whole.read_text().splitlines(keepends=True)
    if torn:
        with table.open("a") as file:
            file.write(lines[3][:-1] if torn == "whole" else lines[3][:40])
    read.clear()
    found = fxpath.compare(dense(), run, csv=table)
    # The reference, which is also the first file, and the one before.
    assert read == ["0.pt", "1.pt", "2.pt", "3.pt", "4.pt"]
    assert table.read_text() == whole.read_text() == found.to_csv()
    read.clear()
    assert fxpath.compare(dense(), run, csv=table).rows == found.rows
    assert read == ["0.pt"]


def test_a_file_that_changed_is_read_again_and_so_is_the_next_pair(
    run: list[str], read: list[str], tmp_path: Path
) -> None:
    table = tmp_path / "out.csv"
    old = fxpath.compare(dense(), run, csv=table)
    torch.save(moved(dense().state_dict(), 9), run[2])
    read.clear()
    found = fxpath.compare(dense(), run, csv=table)
    assert read == ["0.pt", "1.pt", "2.pt", "3.pt"]
    again = fxpath.compare(dense(), run)
    assert found.rows == again.rows != old.rows


def test_a_refused_file_is_tried_again_and_the_next_row_follows(
    run: list[str], tmp_path: Path
) -> None:
    table, good = tmp_path / "out.csv", Path(run[1]).read_bytes()
    Path(run[1]).write_text("half of a file")
    found = fxpath.compare(dense(), run, csv=table)
    assert list(found.refused) == [run[1]] and found.rows[1]["previous"] == run[0]
    Path(run[1]).write_bytes(good)
    found = fxpath.compare(dense(), run, csv=table)
    assert found.rows == fxpath.compare(dense(), run).rows and not found.refused
    assert table.read_text() == found.to_csv()


def test_names_of_files_may_hold_anything(tmp_path: Path) -> None:
    names = ["a,b.pt", 'say "c".pt', "line\nend\r.pt"]
    files = [str(tmp_path / name) for name in names]
    for file in files:
        torch.save(moved(dense().state_dict(), len(file)), file)
    table = tmp_path / "out.csv"
    with pytest.raises(Stopped):
        fxpath.compare(dense(), files, csv=table, progress=stop_after(3))
    found = fxpath.compare(dense(), files, csv=table)
    assert [row["file"] for row in found.rows] == files and table.read_bytes() == (
        found.to_csv().encode()
    )


def test_a_table_of_something_else_is_refused(run: list[str], tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    fxpath.compare(dense(), run[:3], csv=table)
    text = table.read_text()
    for model, options in (
        (dense(), {"radius": 2.0}),
        (dense(), {"reference": run[1]}),
        (dense(), {"until": "1"}),
        (nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(-2), nn.Linear(4, 2)), {}),
    ):
        with pytest.raises(ValueError, match="another model, reference or options.*another file"):
            fxpath.compare(model, run[:3], csv=table, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2\.pt, which are not in the list"):
        fxpath.compare(dense(), run[:2], csv=table)
    assert table.read_text() == text
    for other in ("a,b\n1,2\n", "notes"):
        table.write_text(other)
        with pytest.raises(ValueError, match="holds another table"):
            fxpath.compare(dense(), run[:2], csv=table)
        assert table.read_text() == other


# -- forms -----------------------------------------------------------------------------------------


def test_the_result_has_the_forms_of_all_results(run: list[str], tmp_path: Path) -> None:
    found = fxpath.compare(dense(), run[:2])
    assert json.loads(found.to_json())["rows"][1]["previous"] == run[0]
    assert found.to_markdown().count("\n") == 4
    names = [column.name for column in found.table().columns]
    assert all(list(row) == names for row in found.rows)
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == names
    assert repr(found).startswith("<Comparison: 2 checkpoints")


def test_the_plot_has_a_point_for_each_row(run: list[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = fxpath.compare(dense(), run)
    norm, metric = found.plot(dark=True)
    assert list(norm.lines[0].get_ydata()) == [row["log10_path_norm"] for row in found.rows]
    drawn = list(metric.lines[0].get_ydata())
    assert drawn[1:] == [row["reference_relative"] for row in found.rows[1:]]
    assert math.isnan(drawn[0]) and metric.get_yscale() == "log"
    pyplot.close("all")


def test_rows_of_a_reference_in_another_folder_are_made_again(tmp_path: Path) -> None:
    """Of the same name, size and time of change, as an archive leaves them."""
    states = [moved(dense().state_dict(), seed) for seed in range(3)]
    files = [tmp_path / "a" / "ref.safetensors", tmp_path / "b" / "ref.safetensors"]
    files.append(tmp_path / "now.safetensors")
    for state, file in zip(states, files, strict=True):
        file.parent.mkdir(exist_ok=True)
        save_file(state, file)
        os.utime(file, (1, 1))
    table = tmp_path / "rows.csv"
    fxpath.compare(dense(), files[2:], reference=files[0], csv=table)
    with pytest.raises(ValueError, match="another model, reference or options"):
        fxpath.compare(dense(), files[2:], reference=files[1], csv=table)
