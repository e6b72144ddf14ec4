"""What an analysis shows: quantiles, neurons, tables, files."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from fxpath.program.rows import SAMPLE, _smallest


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


@pytest.mark.parametrize("kind", ["normal", "sorted", "zeros", "ties"])
def test_ranks_in_large_tensors(kind: str) -> None:
    size = SAMPLE * 17
    torch.manual_seed(0)
    values = {
        "normal": torch.randn(size).abs(),
        "sorted": torch.rand(size).sort().values,
        "zeros": torch.zeros(size),
        "ties": torch.randint(0, 3, (size,)).float(),
    }[kind]
    ordered = values.sort().values
    for rank in (1, 2, size // 10, size // 2, size - 1, size):
        assert _smallest(values, rank) == ordered[rank - 1]


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
def test_every_verb_takes_the_options_of_analyze(options: dict[str, Any]) -> None:
    model, shape = net(), (2, 6, 6)
    if "compile" in options:  # each verb compiles anew
        model, shape = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (3,)
    expected = fxpath.analyze(model, shape)
    assert fxpath.path_norm(model, shape, **options) == pytest.approx(expected.path_norm)
    norms = fxpath.path_norms(model, shape, q=(1,), **options)
    assert norms[1] == pytest.approx(expected.path_norm)
    magnitudes = fxpath.path_magnitude(model, shape, **options)
    for scores in (magnitudes, fxpath.criteria.path_magnitude(model, shape, **options)):
        assert scores.keys() == expected.scores.keys()
