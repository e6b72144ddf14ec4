"""Masks in files and in training, and N:M patterns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxpath
from tests.support.nets import randomize
from tests.support.pruning import SHAPE, net

# Files and training -------------------------------------------------------------------


def test_masks_are_saved_and_loaded(tmp_path: Path) -> None:
    model = net()
    pruned = fxpath.prune(model, 0.5, SHAPE)
    pruned.save(tmp_path / "masks.safetensors")
    masks = fxpath.load_masks(tmp_path / "masks.safetensors")
    assert masks.keys() == pruned.masks.keys()
    assert all(torch.equal(mask, pruned.masks[name]) for name, mask in masks.items())
    assert masks.metadata["format"] == "fxpath.masks/1"
    other = fxpath.prune(net(), 0.4, SHAPE)
    other.save(tmp_path / "other.safetensors")
    metadata = fxpath.load_masks(tmp_path / "other.safetensors").metadata
    assert metadata["dense"] == masks.metadata["dense"]
    assert metadata["pruned"] != masks.metadata["pruned"]


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "lie.safetensors", {"format": "fxpath.masks/1"})
    (tmp_path / "text").write_text("masks")
    for name, words in [
        ("weights.safetensors", "its format is None"),
        ("lie.safetensors", "w are no masks"),
        ("text", "no safetensors file"),
    ]:
        with pytest.raises(ValueError, match=words):
            fxpath.load_masks(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fxpath.load_masks(tmp_path / "nothing")


def test_masks_survive_training_state_dicts_and_copies() -> None:
    model = net()
    pruned = fxpath.prune(model, 0.5, SHAPE)
    held = fxpath.apply_masks(model, pruned.masks)
    assert held is model and prune.is_pruned(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, *SHAPE)).square().mean().backward()
        optimizer.step()
    copied = copy.deepcopy(model)
    loaded = fxpath.apply_masks(net(), pruned.masks)
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(2, *SHAPE)
    for other in (copied, loaded):
        torch.testing.assert_close(other.eval()(x), model.eval()(x))
        for name, mask in pruned.masks.items():
            assert torch.equal(other.state_dict()[f"{name}_mask"].bool(), mask)
            path, _, attribute = name.rpartition(".")
            assert not getattr(other.get_submodule(path), attribute)[~mask].any()
    assert fxpath.path_norm(model, SHAPE) == fxpath.path_norm(copied, SHAPE)
    prune.remove(model[0], "weight")
    model(x)
    assert not model[0].weight[~pruned.masks["0.weight"]].any()


def test_masks_that_do_not_fit_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), parametrizations.weight_norm(nn.Linear(3, 2)))
    model.extra = nn.ParameterList([torch.zeros(2)])
    good = {"0.weight": torch.ones(3, 2, dtype=torch.bool)}
    for name, mask, words in [
        ("2.weight", torch.ones(2, dtype=torch.bool), "no such parameter"),
        ("0.bias", torch.ones(2, dtype=torch.bool), r"shape \(3,\)"),
        ("0.bias", torch.ones(3), "a bool tensor"),
        ("1.weight", torch.ones(2, 3, dtype=torch.bool), "parametrized"),
        ("extra.0", torch.ones(2, dtype=torch.bool), "never called"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
            fxpath.apply_masks(model, {**good, name: mask})
    assert not prune.is_pruned(model)


# Patterns -----------------------------------------------------------------------------


def test_a_pattern_holds_along_the_input_channels() -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 4),
        ),
        0,
    )
    pattern = fxpath.NM(keep=2, of=4)
    assert not fxpath.verify_pattern(model, pattern)
    pruned = fxpath.prune(model, input_shape=SHAPE, pattern=pattern)
    notes = {row.name: row.note for row in pruned.layers}
    assert notes["0.weight"] == "3 input channels are no multiple of 4"
    assert pruned.masks["0.weight"].all()
    assert [row.requested for row in pruned.layers] == [None, 0.5, 0.5, 0.5]
    scores = fxpath.analyze(model, SHAPE).scores
    for name, axis in (("2.weight", 1), ("4.weight", 0), ("7.weight", 1)):
        kept = pruned.masks[name].movedim(axis, -1).reshape(-1, 4)
        rows = scores[name].movedim(axis, -1).reshape(-1, 4)
        for mask, row in zip(kept.tolist(), rows.tolist(), strict=True):
            order = sorted(range(4), key=lambda i: (row[i], i))
            assert [mask[i] for i in order] == [False, False, True, True]
    report = fxpath.verify_pattern(pruned.model(), pattern)
    assert report and {row.name: row.reason != "" for row in report.layers}["0.weight"]
    assert "2:4" in str(report)
    broken = pruned.model()
    with torch.no_grad():
        broken[7].weight[0, :4] = 1
    assert [row.broken for row in fxpath.verify_pattern(broken, pattern).layers][-1] == 1


def test_what_torch_takes_is_said_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 24), nn.Conv2d(4, 32, 1)).half()
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
    rows = fxpath.verify_pattern(model, fxpath.NM(2, 4)).layers
    assert [row.semi_structured for row in rows] == [
        "yes, on a GPU",
        "needs multiples of 32 x 64",
        "no matrix",
    ]
    other = fxpath.verify_pattern(model, fxpath.NM(1, 4)).layers
    assert {row.semi_structured for row in other} == {"not 2:4"}
    for keep, of in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(ValueError, match="0 < keep < of"):
            fxpath.NM(keep, of)
    for numbers in ((2.0, 4), (1, 2.5), (True, 2), ("2", 4)):
        with pytest.raises(TypeError, match="two numbers"):
            fxpath.NM(*numbers)
