"""Plans of channels to remove: plain data that is checked, replayed and stored."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxpath
from fxpath.pruning.plan import Bias, Cut


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.group = nn.Conv2d(6, 6, 1, groups=2)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.norm(self.conv(x)).relu()).relu().mean((2, 3))
        return self.head(self.b(self.a(x).relu()).relu())


@pytest.fixture(scope="module")
def result() -> fxpath.PrunedChannels:
    torch.manual_seed(0)
    return fxpath.prune_channels(Net().eval(), 0.5, (3, 4, 4))


def test_plan_is_json_and_can_be_repeated(result: fxpath.PrunedChannels) -> None:
    plan = fxpath.Plan.from_dict(json.loads(json.dumps(result.plan.to_dict())))
    assert plan == result.plan == fxpath.Plan.from_json(result.plan.to_json())
    model = fxpath.apply_plan(Net(), plan)
    assert model.training and model.get_submodule("b").weight is model.get_submodule("a").weight
    model.load_state_dict(result.model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), result.model(x))
    group = model.get_submodule("group")
    assert isinstance(group, nn.Conv2d) and group.groups == 2
    assert result.plan.tensors["group.weight"].after == tuple(group.weight.shape)


def test_file_holds_plan_and_tensors(result: fxpath.PrunedChannels, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    result.save(path)
    model = fxpath.load_pruned(path, Net().eval())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), result.model(x))
    assert model.get_submodule("b").weight is model.get_submodule("a").weight
    with pytest.raises(ValueError, match=r"head\.weight is .* torch\.float32, in the model"):
        fxpath.load_pruned(path, Net().double())
    with pytest.raises(ValueError, match="conv.weight is missing"):
        fxpath.load_pruned(path, nn.Linear(2, 2))
    state = result.model.state_dict()
    del state["b.weight"]
    plan = {"fxpath.plan": result.plan.to_json()}
    save_file({**state, "more": torch.zeros(1)}, path, plan)
    with pytest.raises(ValueError, match="more is unexpected"):
        fxpath.load_pruned(path, Net())
    save_file({k: v for k, v in state.items() if k != "head.bias"}, path, plan)
    with pytest.raises(ValueError, match=r"head\.bias is missing"):
        fxpath.load_pruned(path, Net())
    save_file(state, path)
    with pytest.raises(ValueError, match="holds no plan"):
        fxpath.load_pruned(path, Net())
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no safetensors file"):
        fxpath.load_pruned(path, Net())


def test_certificate_is_complete_and_can_be_stored(result: fxpath.PrunedChannels) -> None:
    certificate = result.certificate
    assert min(certificate.bounds.values()) >= certificate.lower > 0
    # Two of the removed channels may lie on one path, which counts for both.
    assert (certificate.path_magnitude_sum or 0) >= certificate.value * (1 - 1e-9)
    stored = pickle.loads(pickle.dumps(result))
    assert stored.certificate.to_dict() == certificate.to_dict()
    assert stored.plan == result.plan == copy.deepcopy(result).plan


def changed(plan: fxpath.Plan, *keys: Any, to: Any) -> dict[str, Any]:
    data: Any = copy.deepcopy(plan.to_dict())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    found: dict[str, Any] = data
    return found


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("format",), "zip", "format 'zip'"),
        (("version",), 2, "version 2"),
        (("more",), 2, "more"),
        (("tensors",), [], "not a dict"),
        (("tensors", "conv.weight"), 3, "conv.weight is a int"),
        (("tensors", "conv.weight", "shape"), [6, 3, "3"], "not a list of integers"),
        (("tensors", "conv.weight", "shape"), [6, -3, 3, 3], "negative"),
        (("tensors", "conv.weight", "remove"), {"4": [0]}, "no axis '4'"),
        (("tensors", "conv.weight", "remove"), {"0": [0], "00": [1]}, "no axis '00'"),
        (("tensors", "conv.weight", "remove"), {"0": [0, 0]}, "not distinct"),
        (("tensors", "conv.weight", "remove"), {"0": [2, 1]}, "not ascending"),
        (("tensors", "conv.weight", "remove"), {"0": [6]}, "outside of 0 ... 5"),
        (("tensors", "conv.weight", "remove"), {"0": [-1]}, "outside of 0 ... 5"),
        (("tensors", "conv.weight", "remove"), {"0": [True]}, "not a list of integers"),
        (("tensors", "conv.weight", "remove"), {"0": [0, 1, 2, 3, 4, 5]}, "no position"),
        (("tensors", "group.weight", "within"), [[0], [0, 1]], "differ in size"),
        (("tensors", "group.weight", "within"), [[0]] * 4, "differ in size"),
        (("attributes", "conv", "out_channels"), [6, 9], "a smaller one after"),
        (("attributes", "conv", "out_channels"), [6], "a number before"),
        (("biases",), {"head.bias": {"add": [float("nan")], "create": False}}, "finite"),
        (("biases",), {"head.bias": {"add": [10**400], "create": False}}, "finite"),
    ],
)
def test_plans_are_not_trusted(
    result: fxpath.PrunedChannels, keys: tuple[str, ...], to: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fxpath.Plan.from_dict(changed(result.plan, *keys, to=to))


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("tensors", "conv.weight", "shape"), [7, 3, 3, 3], r"conv.weight has shape \(6, 3"),
        (("tensors", "nope"), {"shape": [3], "remove": {}}, "nope is missing"),
        (("attributes", "conv", "stride"), [1, 1], "conv.stride is"),
        (("attributes", "conv", "out_channels"), [8, 2], "conv.out_channels is 6"),
        (("attributes", "nope"), {"groups": [2, 1]}, "nope.groups is None"),
        (("biases",), {"head.bias": {"add": [1.0], "create": False}}, "head.bias has 2 entries"),
        (("biases",), {"head.bias": {"add": [1.0, 2.0], "create": True}}, "lacks"),
    ],
)
def test_plans_must_fit(
    result: fxpath.PrunedChannels, keys: tuple[str, ...], to: object, message: str
) -> None:
    plan = fxpath.Plan.from_dict(changed(result.plan, *keys, to=to))
    with pytest.raises(ValueError, match=f"another model: .*{message}"):
        fxpath.apply_plan(Net(), plan)


def test_plans_made_by_hand_are_checked() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
    model.add_module("3", nn.Linear(3, 3))
    model[3].weight = model[2].weight
    for tensors, message in (
        ({"0.bias": Cut((3,), {0: (-1,)})}, "outside of 0 ... 2"),
        ({"0.bias": Cut((3,), {1: (0,)})}, "no axis '1'"),
        ({"0.weight": Cut((3, 2), {0: (0,)})}, "0.out_features would be 3 where there are 2"),
        (
            {"2.weight": Cut((3, 3), {0: (0,)}), "3.weight": Cut((3, 3), {0: (1,)})},
            "3.weight is 2.weight, and loses something else",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fxpath.apply_plan(model, fxpath.Plan(tensors))
    with pytest.raises(TypeError, match="the plan is a dict"):
        fxpath.apply_plan(model, fxpath.Plan().to_dict())  # type: ignore[arg-type]


def test_text_that_is_no_plan() -> None:
    for text in ("", "[]", "{}", '"x"', "[" * 100000):
        with pytest.raises(ValueError, match="plan"):
            fxpath.Plan.from_json(text)


def test_biases_are_added_to_or_made() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    plan = fxpath.Plan(
        {"0.weight": Cut((3, 2), {0: (1,)}), "0.bias": Cut((3,), {0: (1,)}),
         "2.weight": Cut((2, 3), {1: (1,)})},
        {"0": {"out_features": (3, 2)}, "2": {"in_features": (3, 2)}},
        {"2.bias": Bias((0.5, -1.0), True), "0.bias": Bias((1.0, 2.0))},
    )  # fmt: skip
    smaller = fxpath.apply_plan(model, fxpath.Plan.from_dict(plan.to_dict()))
    assert isinstance(smaller, nn.Sequential)
    assert smaller[2].bias.tolist() == [0.5, -1.0] and smaller[2].bias.requires_grad
    kept = model[0].bias.detach()[[0, 2]]
    torch.testing.assert_close(smaller[0].bias.detach(), kept + torch.tensor([1.0, 2.0]))
    assert model[2].bias is None


def test_what_a_model_is_beside_its_sizes_stays() -> None:
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Dropout())
    model = model.to(memory_format=torch.channels_last).double()  # type: ignore[call-overload]
    model[0].weight.requires_grad_(False)
    model[0].eval()
    model[1].register_forward_hook(lambda *_: calls.append(None))
    smaller = fxpath.prune_channels(model, 0.5, (3, 8, 8)).model
    assert isinstance(smaller, nn.Sequential)
    assert smaller[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert smaller[2].weight.dtype == torch.float64 and smaller[2].weight.shape[1] == 4
    assert not smaller[0].weight.requires_grad and smaller[2].weight.requires_grad
    assert [module.training for module in smaller] == [False, True, True, True]
    calls.clear()
    program = torch.export.export(smaller.eval(), (torch.zeros(1, 3, 8, 8).double(),))
    assert program.module()(torch.ones(1, 3, 8, 8).double()).shape == (1, 4, 4, 4)
    smaller(torch.zeros(1, 3, 8, 8).double()).sum().backward()
    assert calls and smaller[2].weight.grad is not None
