"""Pruning models that hold their weights in other ways: masked, tied, computed, read elsewhere."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from tests.support.nets import randomize
from tests.support.pruning import SHAPE, cut_entries, net


def test_a_pruned_model_keeps_its_zeros() -> None:
    model = net()
    once = fxpath.prune(model, 0.4, SHAPE)
    again = fxpath.prune(once.model(), 0.4, SHAPE)
    assert cut_entries(again) == cut_entries(once) and again.certificate.value == 0
    further = fxpath.prune(once.model(), 0.5, SHAPE)
    assert cut_entries(once) < cut_entries(further)

    held = fxpath.apply_masks(copy.deepcopy(model), once.masks)
    held.eval()(torch.randn(2, *SHAPE)).sum().backward()
    masked = fxpath.prune(held, 0.5, SHAPE)
    assert cut_entries(masked) == cut_entries(further)
    assert "0.weight_orig" in masked.state_dict
    result = masked.model()
    assert prune.is_pruned(result)
    metric = fxpath.path_metric(held, result, SHAPE)
    assert masked.certificate.value == pytest.approx(metric.value, rel=1e-12)
    zeros = sum(int((masked.state_dict[f"{n}_orig"] == 0).sum()) for n in masked.masks)
    assert zeros == len(cut_entries(masked))


def test_computed_weights_are_refused_by_name() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"^0.weight: computed .*remove_parametrizations"):
        fxpath.prune(model, 0.1, (3,))
    pruned = fxpath.prune(model, 0.2, (3,), exclude="0.*")
    assert list(pruned.masks) == ["2.weight"]
    assert fxpath.path_metric(model, pruned.model(), (3,)).value == pruned.certificate.value


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.gain = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.decode(torch.relu(self.encode(x)))) @ self.gain


def test_tied_weights_and_parameters_of_no_layer() -> None:
    model = randomize(Tied(), 1)
    pruned = fxpath.prune(model, 0.4, (4,))
    assert list(pruned.masks) == ["encode.weight", "gain"]
    state = pruned.state_dict
    assert torch.equal(state["encode.weight"], state["decode.weight"])
    assert state["encode.weight"].data_ptr() != state["decode.weight"].data_ptr()
    result = pruned.model()
    assert result.decode.weight is result.encode.weight
    metric = fxpath.path_metric(model, result, (4,))
    assert pruned.certificate.value == pytest.approx(metric.value, rel=1e-12)
    held = fxpath.apply_masks(copy.deepcopy(model), pruned.masks)
    assert held.decode.weight_orig is held.encode.weight_orig
    x = torch.randn(5, 4)
    torch.testing.assert_close(held(x), result(x))


def test_the_part_in_front_of_until_is_pruned() -> None:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2)
    )
    with pytest.raises(fxpath.UnsupportedModelError, match="until"):
        fxpath.prune(model, 0.1, (3,))
    pruned = fxpath.prune(model, 0.3, (3,), until="2")
    assert list(pruned.masks) == ["0.weight", "2.weight"]
    metric = fxpath.path_metric(model, pruned.model(), (3,), until="2")
    assert pruned.certificate.value == pytest.approx(metric.value, rel=1e-12)


def test_results_are_data() -> None:
    pruned = fxpath.prune(net(), 0.5, SHAPE)
    json.dumps(pruned.certificate.to_dict())
    entries = sum(mask.numel() for mask in pruned.masks.values())
    assert pruned.sparsity == pytest.approx(round(0.5 * entries) / entries)
    table = str(pruned)
    assert "exact (7)" in table and "(13)" in table and "TensorRT (2:4" in table
    assert "50.0% zeros" in repr(pruned)


class Decoder(nn.Module):
    """Reads the weights of layers, of which one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.only_read = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.encode(F.linear(x, self.only_read.weight)))
        return F.linear(hidden, self.encode.weight.t())


def test_masked_weights_are_trained_where_they_are_read_without_a_call() -> None:
    model = randomize(Decoder(), 2)
    pruned, x = fxpath.prune(model, 0.2, (4,)), torch.randn(5, 4)
    held, plain = fxpath.apply_masks(copy.deepcopy(model), pruned.masks), pruned.model()
    for _ in range(2):
        for module in (held, plain):
            module.zero_grad()
            module(x).square().sum().backward()
        for name, mask in pruned.masks.items():
            grad = plain.get_parameter(name).grad
            torch.testing.assert_close(held.get_parameter(f"{name}_orig").grad, grad * mask)
            with torch.no_grad():
                plain.get_parameter(name).mul_(2)
                held.get_parameter(f"{name}_orig").mul_(2)
    torch.testing.assert_close(copy.deepcopy(held)(x), plain(x))


def test_a_masked_model_counts_its_zeros_and_shows_new_ones() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 0)
    held = fxpath.apply_masks(model, fxpath.prune(model, 0.25, (4,)).masks)
    assert fxpath.prune(held, 0, (4,)).sparsity == 0.25
    patterned = fxpath.prune(held, input_shape=(4,), pattern=fxpath.NM(2, 4)).model()
    assert int((patterned[0].weight == 0).sum()) == 8
    assert fxpath.verify_pattern(patterned, fxpath.NM(2, 4))
    with torch.no_grad():
        patterned[0].weight_orig.fill_(1)
        patterned[0].weight_mask.fill_(1)
    assert not fxpath.verify_pattern(patterned, fxpath.NM(2, 4))


class Shared(nn.Module):
    """One vector as a weight, and as something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.norm = kind, nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)
        self.vector = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
        if kind in ("weight", "bias"):
            setattr(self.norm, kind, self.vector)
        if kind == "bias":
            self.last.bias = self.vector

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)) if self.kind in ("weight", "bias") else self.first(x)
        y = F.prelu(y, self.vector) if self.kind == "slope" else torch.relu(y)
        if self.kind == "computed":
            y = y * (self.vector - self.vector.mean())
        y = self.last(y)
        return y if self.kind == "bias" else y + (x @ self.vector)[:, None]


@pytest.mark.parametrize("kind", ["weight", "bias", "slope", "computed"])
def test_weights_that_other_numbers_come_from_are_refused(kind: str) -> None:
    """Their zeros are no zeros there: the certificate was wrong."""
    model = Shared(kind)
    options: dict[str, Any] = {"biases": kind == "bias"}
    with pytest.raises(ValueError, match=r"^vector[\w:]*: .*computed from it, too"):
        fxpath.prune(model, 2, (3,), **options)
    pruned = fxpath.prune(model, 2, (3,), exclude="vector", **options)
    metric = fxpath.path_metric(model, pruned.model(), (3,))
    assert not any("vector" in name for name in pruned.masks)
    assert pruned.certificate.value == pytest.approx(metric.value, rel=1e-12)


def test_a_tied_weight_is_spared_by_each_of_its_names() -> None:
    model = randomize(Tied(), 1)
    assert list(fxpath.prune(model, 0.2, (4,), exclude="decode.*").masks) == ["gain"]
    assert list(fxpath.prune(model, 0.1, (4,), include="decode.weight").masks) == ["encode.weight"]


class Odd(nn.Module):
    """A layer without entries, state that is no tensor, and a factor below float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.down, self.up = nn.Parameter(torch.zeros(3, 0)), nn.Parameter(torch.zeros(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y * 1e-60) + y @ self.down @ self.up

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    "options", [{}, {"max_layer_sparsity": 0.5}, {"layer_adaptive": True}, {"scope": "layer"}]
)
def test_empty_layers_and_state_that_is_no_tensor(options: dict[str, Any], tmp_path: Path) -> None:
    model = randomize(Odd(), 0).double()
    pruned = fxpath.prune(model, 6, (4,), **options) if options.get("scope") != "layer" else None
    pruned = pruned or fxpath.prune(model, 0.3, (4,), **options)
    assert {row.name: row.sparsity for row in pruned.layers}["down"] == 0
    assert pruned.model().state_dict()["_extra_state"] == {"version": 1}
    pruned.save(tmp_path / "masks.safetensors")
    fxpath.apply_masks(model, fxpath.load_masks(tmp_path / "masks.safetensors"))


def test_an_output_is_missed_behind_any_factor_and_named_along_its_axis() -> None:
    scores = {
        "first.weight": torch.ones(3, 4),
        "last.weight": torch.tensor([[1.0] * 3, [0.0] * 3]),
        **{"down": torch.ones(3, 0), "up": torch.ones(0, 2)},
    }
    model = randomize(Odd(), 0).double()
    one = torch.zeros(4, dtype=torch.float64)
    for inputs, batch_dim, words in [
        (one.expand(2, 4), 0, "channel 1 of output 0"),
        (one.expand(2, 5, 4), 0, "position 1 along axis 2 of output 0"),
        (one, None, "position 1 along axis 0 of output 0"),
    ]:
        with pytest.raises(ValueError, match=f"would reach {words}: prune less"):
            fxpath.prune(model, 3, criterion=scores, example_inputs=(inputs,), batch_dim=batch_dim)


def test_a_state_dict_under_other_names_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def rename(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        for key in list(state):
            state[f"net.{key}"] = state.pop(key)

    model._register_state_dict_hook(rename)
    with pytest.raises(ValueError, match=r"^0.weight, 2.weight: not in the model's state dict"):
        fxpath.prune(model, 0.2, (4,))


def test_a_cap_is_the_decimal_that_was_written() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    scores = {"0.weight": torch.zeros(10, 10), "2.weight": torch.ones(10, 10)}
    pruned = fxpath.prune(model, 14, criterion=scores, max_layer_sparsity=0.07)
    assert [row.pruned for row in pruned.layers] == [7, 7]


def test_entries_that_are_cut_are_no_part_of_what_remains() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    calls: list[int] = []

    def criterion(module: nn.Module) -> dict[str, Tensor]:
        calls.append(1)  # the second time, the entry that is cut looks the largest
        first = torch.tensor([[1.0, 5.0], [6.0, 7.0]])
        first[0, 0] = 1.0 if len(calls) == 1 else 1e6
        return {"0.weight": first, "2.weight": torch.tensor([[4.0, 5.0], [6.0, 7.0]])}

    pruned = fxpath.prune(model, 2, criterion=criterion, steps=2, layer_adaptive=True)
    # 25 / (25 + 36 + 49) is above 16 / (16 + 25 + 36 + 49).
    assert cut_entries(pruned) == {("0.weight", 0), ("2.weight", 0)}
