"""What the theory promises, on real models: (11), (14), sums of shares, invariance, extreme norms.

And what the package promises about the model it is handed: that it is left alone, and that it may
come pruned, parametrized, tied, wrapped, exported or in half precision.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxpath

# Models --------------------------------------------------------------------------------


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with random biases and BatchNorm statistics, not zeros and ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(low + (high - low) * values)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                uniform(parameter, -0.3, 0.3)
            elif parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values * math.sqrt(2 / parameter[0].numel()))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2)
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
    return model.eval()


def resnet18() -> nn.Module:
    return randomized(torchvision.models.resnet18(num_classes=10))


def small_vgg11_bn() -> nn.Module:
    """VGG11-BN for 32 x 32 images: its 100 million weights after the convolutions left out."""
    model = torchvision.models.vgg11_bn(num_classes=10)
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return randomized(model)


def mlp(bias: bool = True) -> nn.Sequential:
    return randomized(
        nn.Sequential(
            nn.Linear(5, 8, bias=bias),
            nn.ReLU(),
            nn.Linear(8, 6, bias=bias),
            nn.ReLU(),
            nn.Linear(6, 3, bias=bias),
        )
    )


class SmallNet(nn.Module):
    """Convolution, BatchNorm, a skip connection, pooling and a linear layer, for `SMALL`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.inner = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(x + self.inner(x))
        return self.fc(self.drop(torch.flatten(F.max_pool2d(x, 2), 1)))


SMALL = (2, 6, 6)


def small_net() -> nn.Module:
    return randomized(SmallNet())


def assert_equal_analyses(
    actual: fxpath.Analysis, expected: fxpath.Analysis, rtol: float = 1e-5, prefix: str = ""
) -> None:
    """Same path-norm, same names, same shares; a share of 0 has to be 0 in both."""
    difference = abs(actual.log10_path_norm - expected.log10_path_norm)
    assert difference <= rtol / math.log(10), f"log10 of the path-norms differ by {difference}"
    assert set(actual.scores) == {prefix + name for name in expected.scores}
    for name, wanted in expected.scores.items():
        got = actual.scores[prefix + name].double()
        assert got.shape == wanted.shape, name
        worst = ((got - wanted.double()).abs() - rtol * wanted.double().abs()).max()
        assert worst <= 0, f"{name}: off by {worst} more than {rtol} relative"


def test_comparison_of_analyses_notices_differences() -> None:
    model = mlp()
    expected = fxpath.analyze(model)
    assert_equal_analyses(fxpath.analyze(copy.deepcopy(model)), expected, rtol=1e-6)
    with torch.no_grad():
        model[2].weight[0, 0] *= 1.01
    with pytest.raises(AssertionError):
        assert_equal_analyses(fxpath.analyze(model), expected)


# (11) and (14) ------------------------------------------------------------------------


def set_to_zero(model: nn.Module, name: str, index: tuple[int, ...]) -> None:
    """Set one entry of the effective parameters to zero."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    with torch.no_grad():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and kind == "bias":
            # The coordinate is the folded bias beta + gamma (b - mu) / sigma. In the models here
            # each BatchNorm follows its convolution in the list of modules too.
            modules = list(model.modules())
            own = modules[modules.index(module) - 1].bias
            shift = module.running_mean - (0 if own is None else own)
            sigma = torch.sqrt(module.running_var + module.eps)
            module.bias[index] = (module.weight * shift / sigma)[index]
        else:
            model.get_parameter(name)[index] = 0.0


def assert_formula_11(model: nn.Module, shape: tuple[int, ...], names: list[str]) -> None:
    """Path-Mag = norm - norm without the entry: for the largest entry, then for any, in turn."""
    analysis = fxpath.analyze(model, shape)
    rng = np.random.default_rng(0)
    for turn, name in enumerate(names):
        scores = analysis.scores[name]
        entry = int(rng.integers(scores.numel())) if turn % 2 else int(scores.argmax())
        index = tuple(int(i) for i in np.unravel_index(entry, tuple(scores.shape)))
        pruned = copy.deepcopy(model)
        set_to_zero(pruned, name, index)
        lost = analysis.path_norm - fxpath.path_norm(pruned, shape)
        magnitude = float(analysis.path_magnitude(name)[index])
        # The subtraction loses what is below the rounding of the norm.
        tolerance = 1e-13 * analysis.path_norm + 1e-9 * magnitude
        assert abs(lost - magnitude) <= tolerance, (name, index, lost, magnitude)


def test_formula_11_on_resnet18() -> None:
    names = ["conv1.weight", "bn1.bias", "layer2.0.downsample.0.weight", "fc.weight"]
    names += ["layer4.1.bn2.bias", "layer1.0.conv2.weight"]
    assert_formula_11(resnet18().double(), (3, 32, 32), names)


def test_formula_11_on_vgg11_bn() -> None:
    names = ["features.0.weight", "features.5.bias", "features.26.bias", "features.25.weight"]
    names += ["classifier.0.bias", "classifier.3.weight"]
    assert_formula_11(small_vgg11_bn().double(), (3, 32, 32), names)


def test_formula_11_is_checked() -> None:
    model = small_net().double()
    honest = fxpath.path_norm
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(fxpath, "path_norm", lambda *args: honest(*args) * (1 - 1e-6))
        assert_formula_11(model, SMALL, ["inner.weight"])


class Tied(nn.Module):
    """A layer used twice in a row and one of whose weights is tied to another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(self.first(x)))))


def relative_derivative(model: nn.Module, shape: Any, parameter: Tensor, index: Any) -> float:
    """theta_i d||Phi||_1/d theta_i by a central difference of fourth order."""
    norms = {}
    value = parameter.detach()[index].clone()
    for step in (-2, -1, 1, 2):
        with torch.no_grad():
            parameter[index] = value * (1 + step * 1e-3)
        norms[step] = fxpath.path_norm(model, shape)
    with torch.no_grad():
        parameter[index] = value
    return (8 * (norms[1] - norms[-1]) - (norms[2] - norms[-2])) / 12e-3


@pytest.mark.parametrize(
    ("make", "shape", "entries"),
    [
        (
            small_net,
            SMALL,
            [("conv.weight", (1, 0, 1, 2)), ("inner.weight", (0, 2, 0, 1)), ("fc.bias", (3,))],
        ),
        (lambda: randomized(Tied()), (4,), [("first.weight", (1, 2)), ("first.bias", (0,))]),
    ],
    ids=["small_net", "tied"],
)
def test_formula_14_against_finite_differences(make: Any, shape: Any, entries: Any) -> None:
    model = make().double()
    analysis = fxpath.analyze(model, shape)
    for name, index in entries:
        derivative = relative_derivative(model, shape, model.get_parameter(name), index)
        assert float(analysis.path_magnitude(name)[index]) == pytest.approx(derivative, rel=1e-8)


# Sums of shares -----------------------------------------------------------------------


def conv_chain(bias: bool) -> nn.Sequential:
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=bias),
            nn.LeakyReLU(1.5),
            nn.AvgPool2d(2, stride=1),
            nn.ConvTranspose2d(4, 3, 2, stride=2, bias=bias),
            nn.Flatten(),
            nn.Linear(3 * 6 * 6, 5, bias=bias),
        )
    )


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (conv_chain, (2, 11, 11))])
def test_shares_of_each_layer_of_a_chain_without_biases_add_up_to_1(make: Any, shape: Any) -> None:
    analysis = fxpath.analyze(make(bias=False).double(), shape)
    assert len(analysis.scores) in (3, 4)
    for name, scores in analysis.scores.items():
        assert float(scores.sum()) == pytest.approx(1, rel=1e-12), name


@pytest.mark.parametrize(
    ("make", "shape", "first"),
    [
        (mlp, (5,), "0.weight"),
        (lambda: conv_chain(bias=True), (2, 11, 11), "0.weight"),
        (small_net, SMALL, "conv.weight"),
        (resnet18, (3, 32, 32), "conv1.weight"),
        (small_vgg11_bn, (3, 32, 32), "features.0.weight"),
    ],
    ids=["mlp", "conv_chain", "small_net", "resnet18", "vgg11_bn"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_path_starts_at_the_first_layer_or_at_a_bias(
    make: Any, shape: Any, first: str, dtype: torch.dtype
) -> None:
    scores = fxpath.analyze(make().to(dtype), shape).scores
    starts = [s for name, s in scores.items() if name == first or name.endswith("bias")]
    total = sum(float(share.double().sum()) for share in starts)
    assert total == pytest.approx(1, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert all(0 <= s.min() and s.max() <= 1 + 1e-6 for s in scores.values())
    assert all(s.dtype == dtype for s in scores.values())


@pytest.mark.parametrize(
    ("make", "shape", "layers"),
    [
        (mlp, (5,), [("0", "0.bias"), ("2", "2.bias"), ("4", "4.bias")]),
        (small_net, SMALL, [("conv", "bn.bias"), ("fc", "fc.bias"), ("inner", None)]),
    ],
    ids=["mlp", "small_net"],
)
def test_share_of_a_neuron_is_the_sum_over_its_edges_and_bias(
    make: Any, shape: Any, layers: Any
) -> None:
    analysis = fxpath.analyze(make().double(), shape)
    for layer, bias in layers:
        expected = analysis.scores[f"{layer}.weight"].flatten(1).sum(1)
        expected = expected + (analysis.scores[bias] if bias else 0)
        torch.testing.assert_close(analysis.neuron_shares[layer], expected, rtol=1e-9, atol=0)


# Invariance ---------------------------------------------------------------------------


def powers_of_two(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 21, (count,), generator=generator)
    exponents[: min(count, 2)] = torch.tensor([-20, 20])[: min(count, 2)]
    return torch.exp2(exponents.float())


@torch.no_grad()
def rescale(first: nn.Module, norm: nn.Module | None, second: nn.Module, seed: int) -> None:
    """Multiply the neurons of `first` by powers of two and divide them out in `second`.

    With BatchNorm in between its running mean and bias take part, as in appendix D of the paper.
    """
    factors = powers_of_two(len(first.weight), seed)
    first.weight.mul_(factors.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.mul_(factors)
    if norm is not None:
        norm.running_mean.mul_(factors)
        norm.bias.mul_(factors)
    columns = factors.repeat_interleave(second.weight.shape[1] // len(factors))
    second.weight.div_(columns.view(1, -1, *[1] * (second.weight.dim() - 2)))


def rescaled_resnet18(model: nn.Module) -> nn.Module:
    for number, block in enumerate(m for m in model.modules() if hasattr(m, "downsample")):
        rescale(block.conv1, block.bn1, block.conv2, number)
    return model


def rescaled_chain(model: nn.Module) -> nn.Module:
    """Rescales between all layers with weights that follow each other in `model.modules()`."""
    maps = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for number, (first, second) in enumerate(zip(maps, maps[1:], strict=False)):
        norm = norms[number] if number < len(norms) else None
        rescale(first, norm, second, number)
    return model


def conv_net() -> nn.Module:
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 2 * 2, 10),
        )
    )


@pytest.mark.parametrize(
    ("make", "change", "shape"),
    [
        (mlp, rescaled_chain, (5,)),
        (conv_net, rescaled_chain, (2, 10, 10)),
        (small_vgg11_bn, rescaled_chain, (3, 32, 32)),
        (resnet18, rescaled_resnet18, (3, 32, 32)),
    ],
    ids=["mlp", "conv_net", "vgg11_bn", "resnet18"],
)
def test_invariance_under_rescaling_of_neurons(make: Any, change: Any, shape: Any) -> None:
    model = make()
    rescaled = change(copy.deepcopy(model))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(rescaled(x), model(x), rtol=1e-3, atol=1e-4)
    changed = [
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), rescaled.parameters(), strict=True)
    ]
    assert sum(changed) > 2
    assert_equal_analyses(fxpath.analyze(rescaled, shape), fxpath.analyze(model, shape))


def test_a_change_that_is_no_rescaling_is_noticed() -> None:
    model = conv_net()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[4].weight[:, 0].mul_(1.001)
    with pytest.raises(AssertionError):
        assert_equal_analyses(
            fxpath.analyze(changed, (2, 10, 10)), fxpath.analyze(model, (2, 10, 10))
        )


# Numbers that do not fit --------------------------------------------------------------


@pytest.mark.slow
def test_resnet152_in_float32() -> None:
    model = randomized(torchvision.models.resnet152(num_classes=10))
    found = fxpath.analyze(model, (3, 32, 32))
    exact = fxpath.path_norm(model, (3, 32, 32), dtype=torch.float64)
    assert found.log10_path_norm > 100
    assert abs(found.log10_path_norm - math.log10(exact)) < 1e-4 / math.log(10)
    for name, scores in found.scores.items():
        assert scores.isfinite().all(), name
    starts = [s for n, s in found.scores.items() if n == "conv1.weight" or n.endswith("bias")]
    assert sum(float(s.double().sum()) for s in starts) == pytest.approx(1, rel=1e-4)


def chain(weight: float, depth: int, width: int = 2) -> nn.Sequential:
    """Linear layers without biases all of whose weights are equal; its log10 is `chain_log10`."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for parameter in model.parameters():
        nn.init.constant_(parameter, weight)
    return model


def chain_log10(model: nn.Sequential) -> float:
    """Of the width ** (depth + 1) paths each is the product of one weight per layer."""
    weights = [float(parameter.detach().flatten()[0]) for parameter in model.parameters()]
    paths = (len(weights) + 1) * math.log10(model[0].in_features)
    return paths + sum(math.log10(weight) for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weight", "depth"), [(1e20, 20), (1e-20, 20), (1e35, 12), (1e-35, 12)])
def test_norms_of_1e400_and_1e_minus_400(dtype: torch.dtype, weight: float, depth: int) -> None:
    model = chain(weight, depth).to(dtype)
    analysis = fxpath.analyze(model)
    assert abs(analysis.log10_path_norm) > 390
    assert analysis.log10_path_norm == pytest.approx(chain_log10(model), abs=1e-5)
    assert analysis.path_norm == (math.inf if weight > 1 else 0.0)
    for scores in analysis.scores.values():
        torch.testing.assert_close(scores, torch.full((2, 2), 0.25, dtype=dtype))
    if weight > 1:
        with pytest.raises(OverflowError, match="log10"):
            analysis.path_magnitude("0.weight")
        with pytest.raises(OverflowError, match="log10"):
            fxpath.path_magnitude(model)


def test_path_magnitude_that_fits_float64_only() -> None:
    model = chain(1e20, 3)
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == pytest.approx(10 ** chain_log10(model), rel=1e-5)
    with pytest.raises(OverflowError, match="log10"):
        analysis.path_magnitude("0.weight")
    wide = fxpath.analyze(model, dtype=torch.float64)
    magnitudes = wide.path_magnitude("0.weight")
    assert magnitudes.dtype == torch.float64
    torch.testing.assert_close(magnitudes, wide.scores["0.weight"] * wide.path_norm)


@pytest.mark.parametrize("q", [0, 0.5, 2, 4])
def test_norm_of_1e400_for_other_exponents(q: float) -> None:
    model = chain(1e20, 20)
    paths, depth, weight = 2**21, 20, math.log10(float(model[0].weight.detach()[0, 0]))
    expected = math.log10(paths) / q + depth * weight if q else math.log10(paths)
    analysis = fxpath.analyze(model, q=q)
    assert analysis.log10_path_norm == pytest.approx(expected, abs=1e-5)
    assert analysis.path_norm == (paths if q == 0 else math.inf)


def test_branches_of_very_different_size_both_count() -> None:
    # 1e25 * 1e-25 and 1e-25 * 1e25: float32 with one scale per tensor would lose one of them.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e25], [1e-25]]))
        model[2].weight.copy_(torch.tensor([[1e-25, 0.0], [0.0, 1e25]]))
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == pytest.approx(2, rel=1e-5)
    first, second = analysis.scores["0.weight"].float(), analysis.scores["2.weight"].float()
    torch.testing.assert_close(first, torch.tensor([[0.5], [0.5]]))
    torch.testing.assert_close(second, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))


@pytest.mark.parametrize("exponent", [1, -1])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_folded_weights_that_do_not_fit_float32(exponent: int, dtype: torch.dtype | None) -> None:
    # gamma W / sigma is 1e45 or 1e-45, and the last layer brings it back.
    model = nn.Sequential(
        nn.Conv1d(1, 1, 1, bias=False), nn.BatchNorm1d(1), nn.Conv1d(1, 1, 1, bias=False)
    ).eval()
    with torch.no_grad():
        model[0].weight.fill_(10.0 ** (30 * exponent))
        model[1].weight.fill_(10.0 ** (15 * exponent))
        model[1].running_var.fill_(1 - model[1].eps)
        model[2].weight.fill_(10.0 ** (-30 * exponent))
    analysis = fxpath.analyze(model, (1, 3), dtype=dtype)
    assert analysis.log10_path_norm == pytest.approx(math.log10(3) + 15 * exponent, abs=1e-6)
    assert {name: float(scores.sum()) for name, scores in analysis.scores.items()} == {
        "0.weight": pytest.approx(1, rel=1e-5),
        "1.bias": 0,
        "2.weight": pytest.approx(1, rel=1e-5),
    }


def test_norm_of_zero() -> None:
    model = mlp(bias=False)
    nn.init.zeros_(model[2].weight)
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == 0
    assert analysis.log10_path_norm == -math.inf
    for name, scores in analysis.scores.items():
        assert torch.equal(scores, torch.zeros_like(scores)), name
        assert torch.equal(analysis.path_magnitude(name), torch.zeros_like(scores)), name
    json.dumps(analysis.to_dict())
    assert str(analysis)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "bn.weight", "bn.running_mean", "fc.bias"])
def test_a_value_that_is_not_finite_is_an_error_that_names_it(name: str, value: float) -> None:
    model = small_net()
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        fxpath.analyze(model, SMALL)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        fxpath.path_norm(model, SMALL)


# The model is left alone --------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    """The content of a tensor; unlike `torch.equal` this tells -0.0 from 0.0 and knows NaN."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def describe_tensor(tensor: Tensor) -> tuple[Any, ...]:
    grad = None if tensor.grad_fn is not None else tensor.grad
    return (
        id(tensor),
        tensor.data_ptr(),
        tensor._version,
        tensor.requires_grad,
        tuple(tensor.shape),
        tensor.dtype,
        bits(tensor),
        None if grad is None else (id(grad), bits(grad)),
    )


def describe_value(value: Any) -> Any:
    """A module attribute by identity and content."""
    if isinstance(value, Tensor):
        return describe_tensor(value)
    if isinstance(value, dict):  # parameters, buffers, submodules, all kinds of hooks
        return id(value), [(key, describe_value(item)) for key, item in value.items()]
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return value
    return id(value)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an analysis could change, down to single attributes of every module."""
    state: dict[str, Any] = {
        f"{name}.{key}": describe_value(value)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
    }
    state["classes"] = [type(module) for module in model.modules()]
    state["torch rng"] = bits(torch.get_rng_state())
    state["numpy rng"] = repr(np.random.get_state(legacy=False)["state"])
    state["python rng"] = random.getstate()
    state["grad mode"] = torch.is_grad_enabled(), torch.get_default_dtype()
    state["threads"] = torch.get_num_threads()
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv.weight.detach().mul_(1.0),
        lambda m: m.conv.weight.data.view(-1)[0].neg_(),
        lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.detach().clone())),
        lambda m: m.bn.running_mean.add_(1),
        lambda m: m.bn.num_batches_tracked.add_(1),
        lambda m: m.drop.train(),
        lambda m: m.fc.bias.requires_grad_(False),
        lambda m: setattr(m.fc.bias, "grad", torch.ones(4)),
        lambda m: m.fc.register_forward_hook(lambda *_: None),
        lambda m: m.fc.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        lambda m: m.register_buffer("extra", torch.ones(1)),
        lambda m: m.add_module("extra", nn.ReLU()),
        lambda m: setattr(m.conv, "forward", m.conv.forward),
        lambda m: torch.rand(1),
        lambda m: np.random.rand(),
        lambda m: random.random(),
    ],
)
def test_snapshot_notices_changes(change: Callable[[nn.Module], object]) -> None:
    model = small_net()
    before = snapshot(model)
    assert not differences(before, snapshot(model))
    change(model)
    assert differences(before, snapshot(model))


class Unsupported(SmallNet):
    """An operation outside the model class, after some that are inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Branching(SmallNet):
    """Control flow that depends on data: it can't be captured at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else x


def in_training(model: nn.Module) -> nn.Module:
    """Train mode, except for one module, with gradients and a frozen parameter."""
    model.train()
    model(torch.ones(3, *SMALL)).sum().backward()
    model.fc.bias.requires_grad_(False)
    model.bn.eval()
    return model


def pruned_net() -> nn.Module:
    torch.manual_seed(0)
    model = small_net()
    prune.random_unstructured(model.conv, "weight", amount=0.3)
    prune.ln_structured(model.inner, "weight", amount=1, n=1, dim=0)
    prune.l1_unstructured(model.fc, "bias", amount=1)
    return model


def parametrized_net() -> nn.Module:
    torch.manual_seed(0)
    model = small_net()
    parametrizations.weight_norm(model.conv)
    parametrizations.spectral_norm(model.inner)
    return model


def hooked_net() -> nn.Module:
    model = small_net()
    model.conv.register_forward_hook(lambda *_: None)
    model.fc.register_full_backward_hook(lambda *_: None)
    return model


UNTOUCHED = {
    "eval": small_net,
    "train": lambda: in_training(small_net()),
    "unsupported": lambda: in_training(randomized(Unsupported())),
    "branching": lambda: randomized(Branching()).train(),
    "pruned": lambda: pruned_net().train(),
    "parametrized": parametrized_net,
    "parametrized, train": lambda: parametrized_net().train(),
    "half": lambda: small_net().half(),
    "hooks": hooked_net,
    "data parallel": lambda: nn.DataParallel(small_net()).train(),
    "not finite": lambda: small_net().apply(
        lambda m: isinstance(m, nn.Linear) and nn.init.constant_(m.bias, math.nan)
    ),
    "all frozen": lambda: small_net().requires_grad_(False),
}
RAISES = {"unsupported", "branching", "not finite"}


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_the_model_is_left_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = UNTOUCHED[kind]()
    before = snapshot(model)
    for verb in (fxpath.analyze, fxpath.path_norm, fxpath.path_magnitude):
        if kind in RAISES:
            with pytest.raises((fxpath.UnsupportedModelError, ValueError)):
                verb(model, SMALL)
        else:
            verb(model, SMALL)
        assert differences(before, snapshot(model)) == [], verb.__name__
    if kind != "branching":
        fxpath.check(model, SMALL)
        assert differences(before, snapshot(model)) == []


def test_a_real_model_in_train_mode_is_left_alone() -> None:
    model = resnet18().train()
    before = snapshot(model)
    analysis = fxpath.analyze(model, (3, 32, 32))
    assert differences(before, snapshot(model)) == []
    assert_equal_analyses(analysis, fxpath.analyze(model.eval(), (3, 32, 32)), rtol=1e-6)


def test_example_inputs_are_left_alone() -> None:
    model = small_net()
    x = torch.randn(1, *SMALL, requires_grad=True)
    before = snapshot(model), describe_tensor(x)
    analysis = fxpath.analyze(model, example_inputs=(x,))
    assert differences(before[0], snapshot(model)) == []
    assert describe_tensor(x) == before[1]
    assert_equal_analyses(analysis, fxpath.analyze(model, SMALL), rtol=1e-6)


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.enable_grad,
    ],
    ids=["no_grad", "inference_mode", "autocast", "enable_grad"],
)
def test_modes_of_the_caller_change_nothing(context: Callable[[], Any]) -> None:
    model = small_net()
    expected = fxpath.analyze(model, SMALL)
    before = snapshot(model)
    with context():
        analysis = fxpath.analyze(model, SMALL)
    assert_equal_analyses(analysis, expected, rtol=1e-6)
    assert differences(before, snapshot(model)) == []


def test_results_are_detached_and_independent_of_the_model() -> None:
    model = mlp()
    analysis = fxpath.analyze(model)
    kept = {name: scores.clone() for name, scores in analysis.scores.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, scores in analysis.scores.items():
        assert not scores.requires_grad
        assert torch.equal(scores, kept[name])


# Models that come in another form -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    analysis = fxpath.analyze(model, SMALL)
    assert all(scores.dtype == torch.float32 for scores in analysis.scores.values())
    assert_equal_analyses(analysis, fxpath.analyze(copy.deepcopy(model).float(), SMALL), rtol=1e-6)
    deep = chain(100.0, 40).to(dtype)
    assert fxpath.analyze(deep).log10_path_norm == pytest.approx(chain_log10(deep), abs=1e-5)


def test_dtype_of_the_computation() -> None:
    model = small_net()
    wide = fxpath.analyze(model, SMALL, dtype=torch.float64)
    assert all(scores.dtype == torch.float64 for scores in wide.scores.values())
    assert_equal_analyses(wide, fxpath.analyze(copy.deepcopy(model).double(), SMALL), rtol=1e-12)
    narrow = fxpath.analyze(copy.deepcopy(model).double(), SMALL, dtype=torch.float32)
    assert all(scores.dtype == torch.float32 for scores in narrow.scores.values())
    assert_equal_analyses(narrow, wide)


def test_data_parallel_names_are_those_of_the_wrapper() -> None:
    model = small_net()
    wrapped = nn.DataParallel(model)
    analysis = fxpath.analyze(wrapped, SMALL)
    assert_equal_analyses(analysis, fxpath.analyze(model, SMALL), rtol=1e-6, prefix="module.")
    assert set(analysis.scores) <= set(dict(wrapped.named_parameters()))


def exported(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(1, *shape),))


@pytest.mark.parametrize("make", [small_net, resnet18], ids=["small_net", "resnet18"])
def test_exported_programs_and_graph_modules_are_accepted(make: Any) -> None:
    model = make()
    shape = SMALL if make is small_net else (3, 32, 32)
    expected = fxpath.analyze(model, shape)
    traced = torch.fx.symbolic_trace(model)
    assert_equal_analyses(fxpath.analyze(traced, shape), expected, rtol=1e-6)
    program = exported(model, shape)
    before = {name: bits(value) for name, value in program.state_dict.items()}
    code = program.graph_module.code
    assert_equal_analyses(fxpath.analyze(program), expected, rtol=1e-6)
    assert program.graph_module.code == code
    assert {name: bits(value) for name, value in program.state_dict.items()} == before


def test_pruned_models_have_the_scores_of_their_effective_weights() -> None:
    model, baked = pruned_net(), pruned_net()
    for module, name in ((baked.conv, "weight"), (baked.inner, "weight"), (baked.fc, "bias")):
        prune.remove(module, name)
    analysis = fxpath.analyze(model, SMALL)
    assert_equal_analyses(analysis, fxpath.analyze(baked, SMALL), rtol=1e-6)
    masked = model.conv.weight_mask == 0
    assert masked.any()
    assert (analysis.scores["conv.weight"][masked] == 0).all()
    with torch.no_grad():  # values under the mask don't matter
        model.conv.weight_orig[masked] = 1e6
    assert_equal_analyses(fxpath.analyze(model, SMALL), analysis, rtol=1e-6)


def test_parametrized_models_have_the_scores_of_their_effective_weights() -> None:
    model, baked = parametrized_net(), parametrized_net()  # a deepcopy would share their classes
    for module in (baked.conv, baked.inner):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert_equal_analyses(fxpath.analyze(model, SMALL), fxpath.analyze(baked, SMALL))


def test_parametrized_models_in_train_mode() -> None:
    # Spectral norm improves its estimate on every call in train mode; an analysis must not.
    model = parametrized_net()
    expected = fxpath.analyze(model, SMALL)
    assert_equal_analyses(fxpath.analyze(model.train(), SMALL), expected, rtol=1e-6)


def test_tied_weights_have_one_score_under_their_first_name() -> None:
    tied = randomized(Tied()).double()
    loose = copy.deepcopy(tied)
    loose.second.weight = nn.Parameter(loose.first.weight.detach().clone())
    analysis, expected = fxpath.analyze(tied, (4,)), fxpath.analyze(loose, (4,))
    assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    assert set(analysis.scores) == set(dict(tied.named_parameters()))
    total = expected.scores["first.weight"] + expected.scores["second.weight"]
    torch.testing.assert_close(analysis.scores["first.weight"], total, rtol=1e-12, atol=0)


class Reused(nn.Module):
    """One convolution with a BatchNorm of its own for each of two uses, and a shared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.bn = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for bn in self.bn:
            x = self.relu(bn(self.conv(x)))
        return x


def test_a_reused_module_scores_the_sum_over_its_uses() -> None:
    model = randomized(Reused()).double()
    convolutions = [copy.deepcopy(model.conv) for _ in model.bn]
    layers = zip(convolutions, copy.deepcopy(model.bn), strict=True)
    unrolled = nn.Sequential(*[nn.Sequential(conv, bn, nn.ReLU()) for conv, bn in layers]).eval()
    analysis, expected = fxpath.analyze(model, (2, 7)), fxpath.analyze(unrolled, (2, 7))
    assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    assert set(analysis.scores) == {"conv.weight", "bn.0.bias", "bn.1.bias"}
    total = expected.scores["0.0.weight"] + expected.scores["1.0.weight"]
    torch.testing.assert_close(analysis.scores["conv.weight"], total, rtol=1e-12, atol=0)
    for use in (0, 1):
        torch.testing.assert_close(
            analysis.scores[f"bn.{use}.bias"], expected.scores[f"{use}.1.bias"], rtol=1e-12, atol=0
        )


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions: it has an effective bias for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 2, 3, padding=1)
        self.second = nn.Conv1d(2, 2, 3, padding=1)
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.second(F.relu(self.bn(self.first(x)))))


def test_a_reused_batch_norm_scores_the_sum_over_its_uses() -> None:
    model = randomized(SharedNorm()).double()
    first, second = (nn.Sequential(c, copy.deepcopy(model.bn)) for c in (model.first, model.second))
    unrolled = nn.Sequential(first, nn.ReLU(), second).eval()
    analysis, expected = fxpath.analyze(model, (2, 7)), fxpath.analyze(unrolled, (2, 7))
    assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    assert set(analysis.scores) == {"first.weight", "second.weight", "bn.bias"}
    total = expected.scores["0.1.bias"] + expected.scores["2.1.bias"]
    torch.testing.assert_close(analysis.scores["bn.bias"], total, rtol=1e-12, atol=0)


class Rearranged(nn.Module):
    """Parameters that the forward pass shows in another shape, or cut off from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(8, 4))
        self.v = nn.Parameter(torch.empty(4, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor([0.5, -0.25]))

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.w.chunk(2)
        hidden = F.relu(F.linear(F.relu(F.linear(x, upper)), lower)) * self.scale
        return F.linear(hidden, self.v.detach().t()[:2]) - self.shift


def test_a_rearranged_parameter_keeps_its_name_and_shape() -> None:
    model = randomized(Rearranged()).double()
    analysis = fxpath.analyze(model, (4,))
    assert {name: s.shape for name, s in analysis.scores.items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    for name, index in (
        ("w", (1, 2)),
        ("w", (6, 0)),
        ("v", (3, 1)),
        ("scale", ()),
        ("shift", (1,)),
    ):
        derivative = relative_derivative(model, (4,), model.get_parameter(name), index)
        assert float(analysis.path_magnitude(name)[index]) == pytest.approx(derivative, rel=1e-8)
    assert (analysis.scores["v"][:, 2] == 0).all()


def test_batch_norm_without_parameters_gives_its_bias_a_name() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, affine=False), nn.ReLU())
    model = randomized(model).double()
    scores = fxpath.analyze(model, (2, 5)).scores
    assert set(scores) == {"0.weight", "1.bias"}
    total = sum(float(share.sum()) for share in scores.values())
    assert total == pytest.approx(1, rel=1e-12)


class Several(nn.Module):
    """Two inputs, and a nest of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.left(x) + self.right(y))
        return {"hidden": hidden, "heads": (self.head(hidden), [-hidden])}


class OneOfSeveral(Several):
    """Only one of those outputs."""

    def __init__(self, pick: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pick(super().forward(x, y))


def test_several_inputs_and_outputs() -> None:
    model = randomized(Several()).double()
    analysis = fxpath.analyze(model, [(3,), (2,)])
    picks = (lambda o: o["hidden"], lambda o: o["heads"][0], lambda o: o["heads"][1][0])
    norms = []
    for pick in picks:
        part = OneOfSeveral(pick)
        part.load_state_dict(model.state_dict())
        norms.append(fxpath.path_norm(part.double().eval(), [(3,), (2,)]))
    assert analysis.path_norm == pytest.approx(sum(norms), rel=1e-12)
    inputs = (torch.randn(1, 3).double(), torch.randn(1, 2).double())
    again = fxpath.analyze(model, example_inputs=inputs)
    assert_equal_analyses(again, analysis, rtol=1e-12)
    with_keywords = fxpath.analyze(model, [(3,), (2,)], q=2)
    assert with_keywords.path_norm < analysis.path_norm


class WithHead(nn.Module):
    """A supported body and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net()
        self.classifier = nn.Linear(4, 3)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.classifier(F.relu(self.body(x))))


class WithoutHead(WithHead):
    """The same without the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.body(x)))


def test_until_cuts_the_network_after_a_module() -> None:
    model = randomized(WithHead())
    with pytest.raises(fxpath.UnsupportedModelError, match="softmax"):
        fxpath.analyze(model, SMALL)
    cut = WithoutHead()
    cut.load_state_dict(model.state_dict())
    expected = fxpath.analyze(cut.eval(), SMALL)
    assert_equal_analyses(fxpath.analyze(model, SMALL, until="classifier"), expected, rtol=1e-6)
    body = fxpath.analyze(model, SMALL, until="body")
    assert_equal_analyses(body, fxpath.analyze(model.body, SMALL), rtol=1e-6, prefix="body.")
    assert set(fxpath.analyze(model, SMALL, until="body.bn").scores) == {
        "body.conv.weight",
        "body.bn.bias",
    }
    assert fxpath.path_norm(model, SMALL, until="body") == pytest.approx(body.path_norm)
    with pytest.raises((ValueError, KeyError, AttributeError), match="nowhere"):
        fxpath.analyze(model, SMALL, until="nowhere")


def test_until_names_one_of_several_blocks_of_a_resnet() -> None:
    model = resnet18()
    analysis = fxpath.analyze(model, (3, 32, 32), until="layer1")
    trunk = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
    expected = fxpath.analyze(trunk, (3, 32, 32))
    assert analysis.log10_path_norm == pytest.approx(expected.log10_path_norm, abs=1e-6)
    torch.testing.assert_close(
        analysis.scores["layer1.1.conv2.weight"], expected.scores["4.1.conv2.weight"]
    )


# What comes back ----------------------------------------------------------------------


def test_one_liners_agree_with_the_analysis() -> None:
    model = small_net().double()
    analysis = fxpath.analyze(model, SMALL)
    assert analysis.log10_path_norm == pytest.approx(math.log10(analysis.path_norm), abs=1e-12)
    assert fxpath.path_norm(model, SMALL) == analysis.path_norm
    magnitudes = fxpath.path_magnitude(model, SMALL)
    assert set(magnitudes) == set(analysis.scores)
    for name, magnitude in magnitudes.items():
        torch.testing.assert_close(magnitude, analysis.scores[name] * analysis.path_norm)
        torch.testing.assert_close(magnitude, analysis.path_magnitude(name))
    norms = fxpath.path_norms(model, SMALL, q=(1, 2, 4))
    assert dict(norms) == {
        q: pytest.approx(fxpath.path_norm(model, SMALL, q=q), rel=1e-12) for q in (1, 2, 4)
    }
    assert fxpath.check(model, SMALL)


def test_scores_have_names_and_shapes_of_parameters() -> None:
    model = resnet18()
    parameters = dict(model.named_parameters())
    scores = fxpath.analyze(model, (3, 32, 32)).scores
    assert {name: s.shape for name, s in scores.items()} == {
        name: parameters[name].shape for name in scores
    }
    gammas = {
        name for name in parameters if name.endswith(".weight") and parameters[name].dim() == 1
    }
    assert set(scores) == set(parameters) - gammas


def test_the_report_is_data_and_a_table() -> None:
    model = resnet18()
    analysis = fxpath.analyze(model, (3, 32, 32))
    assert max(len(line) for line in str(analysis).splitlines()) <= 100
    assert "layer1.0.conv1" in str(analysis)
    assert json.loads(json.dumps(analysis.to_dict()))
    assert len(analysis.layers) >= sum(
        isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()
    )


# Programs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> Iterator[tuple[nn.Module, fxpath.PathProgram]]:
    """A tiny MLP and its program; compiling is slow, so all tests share one."""
    model = mlp().double()
    yield model, fxpath.compile(model, (5,))


def test_program_agrees_with_the_analysis_on_live_parameters(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    for factor in (1.0, 3.0, 0.5):
        with torch.no_grad():
            model[2].weight.mul_(factor)
            model[0].bias[0].neg_()
        analysis = fxpath.analyze(model)
        assert program.path_norm() == pytest.approx(analysis.path_norm, rel=1e-12)
        assert program.log10_path_norm() == pytest.approx(analysis.log10_path_norm, abs=1e-12)
        scores = program.scores()
        assert set(scores) == set(analysis.scores)
        for name, wanted in analysis.scores.items():
            torch.testing.assert_close(scores[name], wanted, rtol=1e-11, atol=0)


def test_program_follows_load_state_dict_and_new_data(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    kept = copy.deepcopy(model.state_dict())
    before = program.path_norm()
    model.load_state_dict({name: 2 * value for name, value in kept.items()})
    assert program.path_norm() == pytest.approx(fxpath.path_norm(model), rel=1e-12)
    assert program.path_norm() != pytest.approx(before, rel=0.1)
    model[0].weight.data = model[0].weight.data * 5
    assert program.path_norm() == pytest.approx(fxpath.path_norm(model), rel=1e-12)
    model.load_state_dict(kept)
    assert program.path_norm() == pytest.approx(before, rel=1e-12)


def test_program_differentiates_into_the_parameters(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    model.zero_grad()
    value = program.log_path_norm()
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(math.log(program.path_norm()), rel=1e-12)
    value.backward()
    scores = program.scores()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # (14): the share is theta_i d log||Phi||_1 / d theta_i.
        torch.testing.assert_close(
            parameter.grad * parameter.detach(), scores[name], rtol=1e-10, atol=1e-14
        )
    for name, index in (("0.weight", (3, 2)), ("2.bias", (1,)), ("4.weight", (0, 5))):
        parameter = model.get_parameter(name)
        size = float(parameter.detach()[index])
        derivative = relative_derivative(model, (5,), parameter, index) / program.path_norm()
        assert float(parameter.grad[index]) * size == pytest.approx(derivative, rel=1e-8)


def test_program_regularizes_a_training_loss(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    kept = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = program.log10_path_norm()
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().mean() + 0.5 * program.log_path_norm()).backward()
        optimizer.step()
    assert program.log10_path_norm() < before - 0.01
    model.load_state_dict(kept)
    model.zero_grad()


def test_program_writes_scores_into_buffers_of_the_caller(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    expected = {name: scores.clone() for name, scores in program.scores().items()}
    buffers = {name: torch.full_like(scores, math.nan) for name, scores in expected.items()}
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    for _ in range(2):  # the second call finds the program compiled
        returned = program.scores(out=buffers)
        for name, buffer in buffers.items():
            assert returned[name] is buffer
            assert buffer.data_ptr() == addresses[name]
            torch.testing.assert_close(buffer, expected[name], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"0\.bias"):
        program.scores(out={name: b for name, b in buffers.items() if name != "0.bias"})
    with pytest.raises(ValueError, match=r"0\.bias"):
        program.scores(out={**buffers, "0.bias": torch.zeros(1, dtype=torch.float64)})


def test_program_results_do_not_share_memory(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    first = program.scores()
    kept = {name: scores.clone() for name, scores in first.items()}
    with torch.no_grad():
        model[4].weight[0].mul_(7)
    second = program.scores()
    assert not torch.equal(second["4.weight"], kept["4.weight"])
    for name, scores in first.items():
        assert torch.equal(scores, kept[name]), name
    with torch.no_grad():
        model[4].weight[0].div_(7)


def test_program_leaves_the_model_alone(compiled: tuple[nn.Module, fxpath.PathProgram]) -> None:
    model, program = compiled
    model.zero_grad()
    before = snapshot(model)
    program.path_norm()
    program.log10_path_norm()
    program.scores()
    assert differences(before, snapshot(model)) == []
    program.log_path_norm().backward()
    for parameter in model.parameters():
        parameter.grad = None
    assert differences(before, snapshot(model)) == []


def test_graph_of_a_program_lints_and_prints(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    _, program = compiled
    assert isinstance(program.graph_module, torch.fx.GraphModule)
    program.graph_module.graph.lint()
    assert "p_2_weight" in program.graph_module.print_readable(print_output=False)
    assert str(program.graph_module.graph)
    assert str(program)


def test_program_notices_values_that_are_not_finite(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    kept = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"2\.weight"):
        program.path_norm()
    with pytest.raises(ValueError, match=r"2\.weight"):
        program.scores()
    with torch.no_grad():
        model[2].weight.copy_(kept)


@pytest.mark.slow
def test_program_of_a_network_with_batch_norm_follows_its_statistics() -> None:
    model = small_net().double()
    program = fxpath.compile(model, SMALL)
    for _ in range(2):
        analysis = fxpath.analyze(model, SMALL)
        assert program.path_norm() == pytest.approx(analysis.path_norm, rel=1e-12)
        scores = program.scores()
        for name, wanted in analysis.scores.items():
            torch.testing.assert_close(scores[name], wanted, rtol=1e-11, atol=0)
        with torch.no_grad():
            model.bn.running_var.mul_(3)
            model.bn.running_mean.add_(0.2)
            model.bn.weight[1].neg_()
    program.log_path_norm().backward()
    # gamma has no score, but a regularizer must reach it: through the folded weight and bias.
    for name in ("weight", "bias"):
        parameter = getattr(model.bn, name)
        derivative = relative_derivative(model, SMALL, parameter, (2,)) / program.path_norm()
        grad = float(parameter.grad[2] * parameter.detach()[2])
        assert grad == pytest.approx(derivative, rel=1e-6)


@pytest.mark.slow
def test_analysis_compiled_equals_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_net()
    expected = fxpath.analyze(model, SMALL)
    calls = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(a) or compile_(*a, **k))
    assert_equal_analyses(fxpath.analyze(model, SMALL, compile=True), expected)
    assert calls
