"""Checkpoints: what is averages, state of an optimizer or a mask is not taken for the weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from fxpath.capture.loading.states import fit, fit_state_dict

State = dict[str, Tensor]


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


OWN = net().state_dict()
PLAIN, OTHER = net(1).state_dict(), net(2).state_dict()


def taken(content: object) -> tuple[State, tuple[str, ...]]:
    fitted = fit(content, OWN)
    return fitted.tensors, fitted.notes


def refused(content: object, own: State = OWN) -> str:
    with pytest.raises(ValueError) as caught:
        fit_state_dict(content, own)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(found: State, expected: State) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in OWN)


# State of optimizers, gradients


@pytest.mark.parametrize(
    "key",
    [
        "optimizer",
        "optimizer_state",
        "optimG",
        "opt",
        "gradients",
        "grad_averages",
        "meanGrad",
        "exp_avg",
        "exp_avg_sq",
        "momentum_buffer",
        "first_moments",
        "velocity",
    ],
)
def test_what_training_keeps_is_not_taken(key: str) -> None:
    said = refused({"epoch": 3, key: OTHER})
    assert f"holds no weights: what is under {key} is named as state of an optimizer" in said
    assert "holds no weights" in refused({key: {"state": {"values": OTHER}}})
    assert taken({key: OTHER, "net": PLAIN})[1] == ("took net",)
    flat = {f"{key}.{name}": value for name, value in OTHER.items()}
    assert "4 missing" in refused(flat)


def test_the_closest_weights_are_named() -> None:
    said = refused(
        {"optimizer": {"momentum_buffer": OTHER}, "net": {**PLAIN, "extra": torch.ones(1)}}
    )
    assert "(in net): 1 unexpected: extra" in said
    assert "what is under optimizer.momentum_buffer fits, but is named as state of" in said


@pytest.mark.parametrize("key", ["gradual", "adoption", "graduate_net", "momentum_encoder"])
def test_weights_whose_key_sounds_like_it_are_taken(key: str) -> None:
    assert taken({key: PLAIN})[1] == (f"took {key}",)


# Masks


def pruned() -> State:
    model = net(3)
    prune.random_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    return model.state_dict()


def test_a_weight_beside_its_mask_is_not_clear() -> None:
    state = pruned()
    for content in ({**state, "0.weight": OTHER["0.weight"]}, {**PLAIN, **state}):
        for order in (list(content), list(content)[::-1]):
            said = refused({"model": {name: content[name] for name in order}})
            assert "0.weight is there beside 0.weight_orig and 0.weight_mask" in said


def test_masks_have_the_shapes_of_their_weights() -> None:
    for shape in ((3,), (7,), (1, 3), ()):
        said = refused({**pruned(), "0.weight_mask": torch.ones(shape)})
        by = "x".join(map(str, shape)) or "scalar"
        assert f"0.weight_mask is {by}, and 0.weight_orig 4x3" in said


def test_masks_that_are_no_numbers_of_a_mask() -> None:
    mask = pruned()["0.weight_mask"]
    for value, advice in (
        (mask.to_sparse(), "is not dense"),
        (mask.to(torch.complex64), "is complex"),
        (mask.to("meta"), "has no values"),
        (mask.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
    ):
        assert f"0.weight_mask {advice}" in refused({**pruned(), "0.weight_mask": value})


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bool, torch.int64])
def test_masks_are_counted_and_leave_the_precision(kind: torch.dtype) -> None:
    model = net(3)
    for layer in (0, 2):
        prune.random_unstructured(model[layer], "weight", 0.5)  # type: ignore[index]
    state = model.half().state_dict()
    masks = [name for name in state if name.endswith("_mask")]
    found, notes = taken({**state, **{name: state[name].to(kind) for name in masks}})
    assert notes == (f"multiplied in the masks of pruning ({len(masks)})",) and len(masks) == 2
    for layer in (0, 2):
        prune.remove(model[layer], "weight")  # type: ignore[index]
    assert equal(found, model.state_dict()) and found["0.weight"].dtype == torch.float16


# Averages


def averaged() -> tuple[State, State]:
    """The state of an AveragedModel, and the averages of its two nets by their own names."""
    model = AveragedModel(net(1))
    for seed in (1, 2):
        model.update_parameters(net(seed))
    return model.state_dict(), {name: (PLAIN[name] + OTHER[name]) / 2 for name in OWN}


def test_an_averaged_model_is_called_that() -> None:
    state, mean = averaged()
    found, notes = taken(state)
    assert notes == ("took the averages of an AveragedModel", "dropped the prefix module.")
    assert all(torch.allclose(found[name], mean[name]) for name in OWN)
    parallel = {f"module.{name}": value for name, value in state.items()}
    assert taken({"x": parallel})[1][0] == "took x, the averages of an AveragedModel"


def test_averages_by_their_form_are_left_beside_weights() -> None:
    state, _ = averaged()
    for content in ({"net": PLAIN, "x": state}, {"x": state, "net": PLAIN}):
        found, notes = taken(content)
        assert notes == ("took net", "left x, the averages of an AveragedModel")
        assert equal(found, PLAIN)
    # An AveragedModel that is the model itself is as it is.
    assert fit(state, AveragedModel(net()).state_dict()).notes == ()


@pytest.mark.parametrize("key", ["ema", "model_ema", "modelEMA", "emaModel", "ema2", "avg.net"])
def test_averages_by_a_word_of_their_key(key: str) -> None:
    found, notes = taken({key: OTHER, "net": PLAIN})
    assert notes == ("took net", f"left {key}") and equal(found, PLAIN)
    parts: dict[str, Any] = {f"net.{name}": value for name, value in PLAIN.items()}
    prefix = key.replace(".", "_")
    parts |= {f"{prefix}.{name}": value for name, value in OTHER.items()}
    found, notes = taken(parts)
    assert notes[0] == "took all but averages" and equal(found, PLAIN)


@pytest.mark.parametrize("key", ["cinema", "schema_net", "stigmata", "ñema", "shadowy"])
def test_half_a_word_says_nothing(key: str) -> None:
    said = refused({key: OTHER, "net": PLAIN})
    assert f"two state dicts that fit the model and differ, {key} and net" in said
