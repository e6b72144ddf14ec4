"""What an analysis shows: quantiles, neurons, tables, files."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from fxpath import api
from fxpath.program.spread import CHUNK, Spread
from fxpath.report import plots


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 3),
    )


def scores_of(kind: str) -> torch.Tensor:
    size = CHUNK * 16 + 17
    generator = torch.Generator().manual_seed(0)
    return {
        "normal": torch.randn(size, generator=generator).abs(),
        "wide": torch.exp(torch.randn(size, generator=generator) * 15),
        "sorted": torch.rand(size, generator=generator).sort().values.double(),
        "zeros": torch.zeros(size),
        "ties": torch.randint(0, 3, (size,), generator=generator).float(),
        "subnormal": torch.rand(size, generator=generator) * 1e-43,
        "far below": torch.rand(size, generator=generator).double() * 5e-322,
    }[kind]


@pytest.mark.parametrize(
    "kind", ["normal", "wide", "sorted", "zeros", "ties", "subnormal", "far below"]
)
def test_a_spread_is_what_sorting_finds(kind: str) -> None:
    values = scores_of(kind)
    wide, halves = values.double(), [Spread([part]) for part in values.split(len(values) // 3)]
    ordered = wide.sort().values
    for spread in (Spread([values]), Spread.union(halves)):
        for part in (0.0, 0.1, 0.5, 0.9, 1.0):
            rank = max(1, math.ceil(part * len(ordered)))
            assert spread.quantile(part) == float(ordered[rank - 1])
        assert spread.total == pytest.approx(float(wide.sum()), rel=1e-12)
        assert spread.zeros == int((wide == 0).sum()) and spread.largest == float(ordered[-1])
        edges, counts = spread.histogram(8)
        assert sum(counts) + spread.zeros == len(values) and len(edges) in (0, len(counts) + 1)
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            inside = (wide > 0) & (wide >= 10**low * (1 - 1e-9)) & (wide < 10**high * (1 + 1e-9))
            assert kind in ("subnormal", "far below") or count <= int(inside.sum())
        masses = ordered.flip(0).cumsum(0)
        for part in (0.3, 0.9):
            count = spread.carrying(part)
            if kind == "zeros":
                assert count == 0 and spread.effective == 0
                continue
            assert float(masses[count - 1]) >= part * float(masses[-1]) * (1 - 1e-9)
            assert count == 1 or float(masses[count - 2]) <= part * float(masses[-1]) * (1 + 1e-9)
        if kind not in ("zeros", "far below"):  # whose logarithms float64 does not hold
            shares = wide[wide > 0] / wide.sum()
            assert spread.effective == pytest.approx(float((-(shares * shares.log())).sum().exp()))
        limits = [float(ordered[len(ordered) // 4]), float(ordered[-1])]
        assert spread.at_most(limits) == [int((wide <= limit).sum()) for limit in limits]


def test_findings_are_what_pruning_and_removal_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        model[0].weight[:3] = 0  # three dead channels, whose biases are 0
        model[0].bias[:3] = 0
        model[4].weight[0, 0] = 1e4  # most of the mass
    found = {finding.kind: finding for finding in fxpath.analyze(model).findings}
    assert found["dead_channels"].layers == ("0",) and found["dead_channels"].values == (3.0,)
    assert fxpath.remove_dead(model).layers[0]["after"] == 5
    assert found["concentrated"].layers[0] == "4"
    assert found["concentrated"].values[0] == pytest.approx(1 / 128)


def test_layers_are_empty_where_it_is_said() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back, self.skip = nn.Linear(6, 64), nn.Linear(64, 2), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.back(torch.relu(self.wide(x))) + 20 * self.skip(x)

    torch.manual_seed(0)
    model = Skip()
    (emptied,) = fxpath.analyze(model).findings
    assert emptied.kind == "emptied" and "wide" in emptied.layers
    for name, part in zip(emptied.layers, emptied.values, strict=True):
        entries = 6 * 64 + 64 * 2 + 6 * 2
        with pytest.warns(UserWarning, match=f"{name}.weight"):
            assert not fxpath.prune(model, round(part * entries)).masks[f"{name}.weight"].any()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another one may be empty
            left = fxpath.prune(model, round(part * entries) - 1).masks[f"{name}.weight"]
        assert left.any()


def test_findings_are_none_where_there_is_nothing_to_say() -> None:
    layer = nn.Linear(3, 2)
    assert fxpath.analyze(layer).findings == []


def test_little_mass_and_missing_scores_are_found() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(3, 3), nn.Linear(3, 3)
            self.slope = nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.slope(self.main(x)) + self.side(x)

    model = Side()
    with torch.no_grad():
        model.side.weight.mul_(1e-5)
        model.side.bias.zero_()
    analysis = fxpath.analyze(model, (3,))
    found = {finding.kind: finding for finding in analysis.findings}
    assert found["uncrossed"].layers == ("side",)
    assert found["uncrossed"].values[0] == analysis.layers[1]["share"] < 1e-4
    assert found["unscored"].layers == ("slope.weight",)
    for finding in analysis.findings:
        assert finding.text.splitlines() == [finding.text]
        assert finding.text in " ".join(str(analysis).split())


def test_neuron_shares_are_what_is_lost_without_the_neuron() -> None:
    model = net().double()
    analysis = fxpath.analyze(model, (2, 6, 6))
    assert {name: len(s) for name, s in analysis.neuron_shares.items()} == {"0": 4, "3": 6, "6": 3}
    for layer, channel, channels in (("0", 1, 4), ("3", 4, 6), ("6", 2, 3)):
        removed = copy.deepcopy(model)
        module = removed.get_submodule(layer)
        weight = module.weight
        with torch.no_grad():
            if layer == "3":
                weight.view(2, 2, 3, 2, 2)[channel // 3, :, channel % 3] = 0
            else:
                weight[channel] = 0
            module.bias[channel] = 0
            if layer == "0":  # the batch norm's bias is the neuron's
                removed[1].bias[channel] = 0
                removed[1].running_mean[channel] = 0
        lost = 1 - fxpath.path_norm(removed, (2, 6, 6)) / analysis.path_norm
        assert float(analysis.neuron_shares[layer][channel]) == pytest.approx(lost, rel=1e-10)
        assert len(analysis.neuron_shares[layer]) == channels


def test_rows_tables_and_files() -> None:
    analysis = fxpath.analyze(net(), (2, 6, 6))
    row = analysis.layers[0]
    assert row["name"] == "0" and row["operation"] == "conv2d" and row["shape"] == (4, 1, 3, 3)
    assert row["parameters"] == 36 + 4 and row["sparsity"] == 0
    shares = analysis.scores["0.weight"].flatten().sort().values
    assert row["quantiles"] == {
        "10%": float(shares[3]),
        "50%": float(shares[17]),
        "90%": float(shares[32]),
    }
    assert max(map(len, str(analysis).splitlines())) <= 100
    assert "<table>" in analysis._repr_html_()
    assert json.loads(json.dumps(analysis.to_dict()))["layers"][2]["name"] == "6"
    again = pickle.loads(pickle.dumps(analysis))
    assert again.path_norm == analysis.path_norm and str(again) == str(analysis)


def test_zeros_are_counted() -> None:
    model = net()
    with torch.no_grad():
        model[6].weight[0] = 0
    analysis = fxpath.analyze(model, (2, 6, 6))
    assert analysis.layers[-1]["sparsity"] == pytest.approx(1 / 3)


def test_zeros_that_only_float32_would_make_do_not_count() -> None:
    """The effective weight of a layer with a batch norm is formed in float64."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e-30)
        model[1].weight.fill_(1e-20)
        model[2].weight.fill_(1e30)
        model[0].weight[1, 0] = 0
    analysis = fxpath.analyze(model, (2,))
    assert analysis.layers[0]["sparsity"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "options", [{"compile": True}, {"reduce": False}, {"dtype": torch.float64}]
)
def test_every_verb_takes_the_options_of_analyze(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape = net(), (2, 6, 6)
    backends, build = [], api.build

    def spared(*args: Any, sharded: bool) -> Any:
        # What Inductor finds is compared elsewhere, and five compilers say no more here.
        *most, backend, reduce = args
        backends.append(backend)
        return build(*most, "eager", reduce, sharded=sharded)

    monkeypatch.setattr(api, "build", spared)
    expected = fxpath.analyze(model, shape)
    assert fxpath.path_norm(model, shape, **options) == pytest.approx(expected.path_norm)
    norms = fxpath.path_norms(model, shape, q=(1,), **options)
    assert norms[1] == pytest.approx(expected.path_norm)
    magnitudes = fxpath.path_magnitude(model, shape, **options)
    for scores in (magnitudes, fxpath.criteria.path_shares(model, shape, **options)):
        assert scores.keys() == expected.scores.keys()
    assert backends == ["eager"] + ["inductor" if "compile" in options else "eager"] * 4


def test_tables_have_fixed_columns_and_every_form(tmp_path: Path) -> None:
    analysis = fxpath.analyze(net(), (2, 6, 6))
    table = analysis.table()
    rows = list(csv.DictReader(io.StringIO(analysis.to_csv(tmp_path / "a.csv"))))
    assert (tmp_path / "a.csv").read_text() == analysis.to_csv()
    assert list(rows[0]) == [column.name for column in table.columns]
    assert [row["layer"] for row in rows] == ["0", "3", "6"]
    for row, layer in zip(rows, analysis.layers, strict=True):
        assert float(row["share"]) == layer["share"] and float(row["zeros"]) == layer["sparsity"]
        assert int(row["channels"]) == len(analysis.neuron_shares[row["layer"]])
        weight = analysis.scores[f"{row['layer']}.weight"].double()
        p = weight[weight > 0] / weight.sum()
        assert float(row["effective"]) == pytest.approx(float((-(p * p.log())).sum().exp()))
    assert analysis.to_markdown().splitlines()[2].startswith("| 0 ")
    assert json.loads(analysis.to_json(tmp_path / "a.json")) == json.loads(
        json.dumps(analysis.to_dict())
    )
    frame = pytest.importorskip("pandas").DataFrame(rows)
    found = analysis.to_pandas()
    assert list(found.columns) == list(frame.columns)
    assert found["share"].tolist() == [layer["share"] for layer in analysis.layers]


def test_depth_sums_modules_as_if_their_weights_were_one_tensor() -> None:
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))  # noqa: E731
    model = nn.Sequential(OrderedDict(first=block(), then=nn.ReLU(), second=block()))
    with torch.no_grad():
        model.first[0].weight[0] = 0
    analysis = fxpath.analyze(model)
    first, second = analysis.table(depth=1).rows
    assert (first["layer"], second["layer"]) == ("first", "second")
    assert first["parameters"] == 40 and first["zeros"] == pytest.approx(4 / 32)
    assert first["share"] == pytest.approx(sum(row["share"] for row in analysis.layers[:2]))
    weights = torch.cat([analysis.scores[f"first.{i}.weight"].flatten() for i in (0, 2)])
    assert first["p50"] == float(weights.sort().values[15])
    p = weights[weights > 0].double() / weights.sum()
    assert first["effective"] == pytest.approx(float((-(p * p.log())).sum().exp()))
    assert analysis.table(depth=2).rows == analysis.table().rows
    with pytest.raises(ValueError, match="depth=0"):
        analysis.to_csv(depth=0)


def test_the_curve_bounds_what_pruning_loses() -> None:
    model = net()
    analysis = fxpath.analyze(model, (2, 6, 6))
    points = analysis.report()["curve"]
    assert points[0] == [0, 0] and points[-1][0] == 1
    entries = sum(analysis.scores[f"{name}.weight"].numel() for name in "036")
    for part, bound in [point for point in points if 0 < point[0] < 0.5][::20]:
        pruned = fxpath.prune(model, round(part * entries), (2, 6, 6))
        assert pruned.path_magnitude_share == pytest.approx(bound, rel=1e-5)
        assert pruned.certificate.relative <= bound * (1 + 1e-5)


def test_other_results_are_tables_too() -> None:
    model = net()
    pruned = fxpath.prune(model, 0.5, (2, 6, 6))
    rows = pruned.to_pandas().to_dict("records")
    assert [row["parameter"] for row in rows] == list(pruned.masks)
    assert sum(row["lost"] for row in rows) == pytest.approx(pruned.path_magnitude_share)
    scores = fxpath.analyze(model, (2, 6, 6)).scores
    for row in rows:
        cut = ~pruned.masks[row["parameter"]]
        assert row["lost"] == pytest.approx(float(scores[row["parameter"]][cut].sum()), rel=1e-5)
        assert row["pruned"] == int(cut.sum())
    (whole,) = fxpath.prune(nn.Sequential(OrderedDict(a=model)), 0.5, (2, 6, 6)).table(1).rows
    assert whole["pruned"] == sum(row["pruned"] for row in rows)
    metric = pruned.certificate
    found = metric.to_pandas().set_index("quantity")["value"]
    assert found["upper"] == metric.upper and found["lemma_3_3"] == metric.bound("lemma_3_3")
    bound = fxpath.lipschitz_bound(model, pruned.model(), (2, 6, 6), radius=2.0)
    table = bound.to_pandas().set_index("inequality")["bound"]
    assert table[bound.inequality] == float(bound) == bound.to_dict()["value"]
    assert "[-2, 2]" in str(bound) and "absolute values" in str(bound)
    for result in (pruned, metric, bound):
        json.loads(result.to_json())
        assert result.to_markdown().startswith("|")


def bars(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_pictures_show_the_data() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    model = net()
    analysis = fxpath.analyze(model, (2, 6, 6))
    shares, scores = analysis.plot()
    assert bars(shares) == [row["share"] for row in analysis.layers]
    assert [label.get_text() for label in shares.get_yticklabels()] == ["0", "3", "6"]
    for line, row in zip(scores.lines, analysis.layers, strict=False):
        assert list(line.get_xdata()) == [row["quantiles"]["10%"], row["quantiles"]["90%"]]
    assert list(scores.lines[-1].get_xdata()) == [r["quantiles"]["50%"] for r in analysis.layers]
    pruned = fxpath.prune(model, 0.5, (2, 6, 6))
    zeros, lost = pruned.plot(dark=True)
    assert bars(zeros) == [*(row.sparsity for row in pruned.layers), pruned.sparsity]
    assert bars(lost) == [*(row.lost for row in pruned.layers), pruned.certificate.relative]
    assert max(zeros.get_facecolor()[:3]) < 0.2
    bound = fxpath.lipschitz_bound(model, pruned.model(), (2, 6, 6))
    (axes,) = bound.plot()
    assert sorted(bars(axes)) == sorted(bound.bounds.values())
    pyplot.close("all")


def test_labels_of_150_layers_do_not_overlap() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    names = [f"stage{i // 40}.blocks.{i}.branch.convolution_of_some_length" for i in range(150)]
    rows = [{"layer": n, "share": 1.0, "p10": 1e-9, "p50": 1e-8, "p90": 1e-7} for n in names]
    axes, _ = plots.analysis({"title": "", "rows": rows}, False)
    axes.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 150 and all(box.x0 >= 0 for box in boxes)
    assert all(a.y0 >= b.y1 for a, b in zip(boxes, boxes[1:], strict=False))
    pyplot.close("all")


class Before(nn.Module):
    """Adds its bias before it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bias) @ self.weight


class After(nn.Module):
    """Two layers that share a weight, or a bias; the second one's bias is added behind a ReLU."""

    def __init__(self, tied: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        setattr(self.b, tied, getattr(self.a, tied))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.b(torch.relu(self.a(x)))
        return torch.relu(nn.functional.linear(hidden, self.c.weight)) + self.c.bias


@pytest.mark.parametrize("make", [Before, lambda: After("weight"), lambda: After("bias")])
def test_every_score_is_in_one_row(make: Any) -> None:
    torch.manual_seed(0)
    analysis = fxpath.analyze(make(), (3,))
    scored = sum(score.numel() for score in analysis.scores.values())
    assert sum(row["parameters"] for row in analysis.layers) == scored
    names = [row["name"] for row in analysis.layers]
    assert len(set(names)) == len(names)
    total = sum(float(score.double().sum()) for score in analysis.scores.values())
    assert sum(row["share"] for row in analysis.layers) == pytest.approx(total)
    assert {row["layer"] for row in analysis.table().rows} == set(names)


def test_only_channels_of_layers_are_dead_and_nothing_is_promised_of_them() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(3, 3), nn.Linear(3, 2)
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(torch.relu(self.inner(x)) + self.shift))

    torch.manual_seed(0)
    model = Shifted()
    assert "dead_channels" not in {f.kind for f in fxpath.analyze(model, (3,)).findings}
    model = model.double()
    with torch.no_grad():
        model.inner.weight[1] = 0
        model.inner.bias[1] = 0
        model.inner.weight[2] = 1e-200  # of which float64 has no share
        model.out.weight[:, 2] = 1e-200
        model.inner.bias[2] = 0
    analysis = fxpath.analyze(model, (3,), dtype=torch.float64)
    assert analysis.layers[0]["dead_channels"] == 1


def test_what_is_said_of_pruning_is_said_of_its_exponent_alone() -> None:
    analysis = fxpath.analyze(net(), (2, 6, 6), q=2)
    assert "emptied" not in {finding.kind for finding in analysis.findings}
    assert analysis.report()["curve"] == []


def test_names_of_any_letters_leave_every_form_whole(tmp_path: Path) -> None:
    names = ["a,b", 'q"q', "p|p", "x\ny", "cr\rlf", "\x1b[31m", "$\\frac{$"]
    rows = tuple({"layer": name, "share": 0.5} for name in names)
    table = dataclasses.replace(fxpath.analyze(nn.Linear(2, 1)).table(), rows=rows)
    read = list(csv.DictReader(io.StringIO(table.to_csv(), newline="")))
    assert [row["layer"] for row in read] == names
    assert len(table.to_markdown().splitlines()) == 2 + len(names)
    assert "\x1b" not in table.to_markdown() + str(table) + table.to_html()
    pytest.importorskip("matplotlib").use("Agg")
    full = [{**row, "p10": 0.1, "p50": 0.2, "p90": 0.3} for row in rows]
    axes, _ = plots.analysis({"title": "$\\frac{$", "rows": full}, False)
    axes.figure.savefig(tmp_path / "names.png")
    pytest.importorskip("matplotlib.pyplot").close("all")
