"""The path-metric against enumerated path-liftings, Path-Mag, and itself after rescaling."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxpath
from tests.oracles.networks import Net
from tests.support.changes import CHANGES, changed, inputs_of, lenet, rescale
from tests.support.generated import MAX_PATHS, bounded, nets
from tests.support.nets import randomize
from tests.support.zoo import build

INVARIANT = ("m_normalized", "theorem_f2", "lemma_3_3")


# Against enumeration ------------------------------------------------------------------


@bounded(40)
@given(nets(), st.sampled_from(sorted(CHANGES)), st.integers(0, 10**6))
def test_metric_lies_between_its_bounds_and_is_the_value_where_exact(
    net: Net, how: str, seed: int
) -> None:
    model = net.module()
    other = changed(model, how, seed)
    dag = net.dag(model)
    assume(0 < dag.count_paths() < MAX_PATHS)
    second = net.dag(other)
    phi, phi_other = dag.phi(), second.phi()
    # A state dict: the same pair, and one capture instead of two.
    metric = fxpath.path_metric(model, other.state_dict() or other, example_inputs=inputs_of(net))
    true = float(np.abs(phi - phi_other).sum())
    slack = 1e-9 * true + 1e-12 * metric.path_norm + 1e-12

    assert metric.path_norm == pytest.approx(dag.path_norm(), rel=1e-9, abs=1e-12)
    assert metric.other_path_norm == pytest.approx(second.path_norm(), rel=1e-9, abs=1e-12)
    assert metric.lower <= true + slack
    for name, bound in metric.bounds.items():
        assert bound >= true - slack, name
    one, two = np.abs(phi), np.abs(phi_other)
    dominated = bool((two <= one * (1 + 1e-9)).all() or (one <= two * (1 + 1e-9)).all())
    assert metric.dominated == dominated
    assert metric.exact == (metric.signs_agree and dominated)
    if metric.exact:
        assert metric.value == pytest.approx(true, rel=1e-9, abs=slack)
        assert metric.lower <= metric.value <= metric.upper
        assert [metric.lower, metric.upper] == pytest.approx([metric.value] * 2, rel=1e-9)
        # What the max-plus pass carries, too, although entries decide here.
        carried = metric._comparison.domination.total
        assert carried == pytest.approx(true, rel=1e-9, abs=slack)
    else:
        assert metric.value is None
        assert metric.upper == min(metric.bound(name) for name in INVARIANT)
    if how in ("pruned", "towards zero", "away from zero") and not model_has_norms(net):
        assert metric.exact


def model_has_norms(net: Net) -> bool:
    return any(layer.op == "batchnorm" for layer in net.layers)


@bounded(15)
@given(nets(), st.integers(0, 10**6))
def test_sum_of_path_magnitudes_bounds_the_metric(net: Net, seed: int) -> None:
    assume(not model_has_norms(net))
    model = net.module()
    assume(0 < net.dag(model).count_paths() < MAX_PATHS)
    other = changed(model, "pruned", seed)
    metric = fxpath.path_metric(model, other.state_dict() or other, example_inputs=inputs_of(net))
    expected = 0.0
    dag = net.dag(model)
    for name, index in dag.coordinates():
        if other.get_parameter(name)[index] == 0:
            expected += dag.weighted_magnitude((name, index))
    assert metric.path_magnitude_sum == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert metric.value <= metric.path_magnitude_sum * (1 + 1e-9) + 1e-12


def test_sum_of_path_magnitudes_is_of_pruning_only() -> None:
    model = lenet()
    metric = fxpath.path_metric(model, changed(model, "towards zero", 0), (1, 14, 14))
    assert metric.exact and metric.path_magnitude_sum is None


def test_opposite_signs_of_figure_5_are_not_exact() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    other = copy.deepcopy(model)
    for network, value in ((model, 1.0), (other, -1.0)):
        for parameter in network.parameters():
            nn.init.constant_(parameter, value)
    metric = fxpath.path_metric(model, other)
    assert metric.path_norm == metric.other_path_norm == 1
    assert not metric.signs_agree and metric.dominated
    assert not metric.exact and metric.value is None
    assert metric.lower == 0 and 2 <= metric.upper == pytest.approx(2, rel=1e-12)


def test_difference_is_carried_without_cancellation() -> None:
    model = lenet()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] *= 1 - 2**-50
    metric = fxpath.path_metric(model, other, (1, 14, 14))
    magnitude = fxpath.path_magnitude(model, (1, 14, 14))["3.weight"][0, 0, 0, 0].item()
    assert metric.value == pytest.approx(magnitude * 2**-50, rel=1e-9)
    assert fxpath.path_metric(model, model, (1, 14, 14)).value == 0


# Rescaling ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", sorted(CHANGES))
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_reported_changes_with_the_scale_of_neurons(how: str, bias: bool) -> None:
    model = lenet(bias)
    other = changed(model, how, 1)
    metric = fxpath.path_metric(model, other.state_dict(), (1, 14, 14))
    raw = []
    for seed in range(3):
        pair = [rescale(model, seed), other] if seed else [model, rescale(other, seed)]
        pair = [rescale(model, 5), rescale(other, 6)] if seed == 2 else pair
        again = fxpath.path_metric(pair[0], pair[1].state_dict(), (1, 14, 14))
        assert (again.signs_agree, again.dominated, again.exact) == (
            metric.signs_agree,
            metric.dominated,
            metric.exact,
        )
        assert again.path_norm == pytest.approx(metric.path_norm, rel=1e-12)
        assert again.upper == pytest.approx(metric.upper, rel=1e-9)
        assert again.relative == pytest.approx(metric.relative, rel=1e-9)
        assert again.lower == pytest.approx(metric.lower, rel=1e-6, abs=1e-9 * metric.upper)
        for name in INVARIANT:
            assert again.bound(name) == pytest.approx(metric.bound(name), rel=1e-9), name
        if metric.exact:
            assert again.value == pytest.approx(metric.value, rel=1e-9)
        raw.append(again.bound("m"))
    # The one bound that is labelled so does change: the test sees that networks were rescaled.
    assert max(raw) > (1 + 1e-4) * metric.bound("m")


def test_a_small_change_of_one_path_is_seen_after_rescaling() -> None:
    model = lenet()
    other = changed(model, "towards zero", 2)
    assert fxpath.path_metric(model, rescale(other, 3), (1, 14, 14)).exact
    with torch.no_grad():
        # Where theta' has no smaller entry on some path, that path exceeds theta's.
        for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
            parameter[0] = own[0] * (1 + 1e-6)
    metric = fxpath.path_metric(model, rescale(other, 3), (1, 14, 14))
    assert metric.signs_agree and not metric.dominated and metric.value is None


# Large networks -----------------------------------------------------------------------


@pytest.mark.slow
def test_one_weight_of_vgg16() -> None:
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None).eval()
    # Narrower behind the flattening: a hundred million weights more say nothing more.
    model.classifier = nn.Sequential(nn.Linear(25088, 256), nn.ReLU(), nn.Linear(256, 10))
    state = dict(model.state_dict())
    magnitudes = fxpath.path_magnitude(model, (3, 224, 224))
    for name, index in (("classifier.0.weight", (7, 1234)), ("features.10.weight", (3, 5, 1, 1))):
        pruned = state[name].clone()
        pruned[index] = 0
        metric = fxpath.path_metric(model, {**state, name: pruned}, (3, 224, 224))
        assert metric.exact
        assert metric.value == pytest.approx(magnitudes[name][index].item(), rel=1e-3)
        assert metric.relative < 1e-6


def test_norms_far_beyond_float32() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(40) for m in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 2))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(100)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] = 0
    metric = fxpath.path_metric(model, other)
    analysis = fxpath.analyze(model)
    share = math.log10(analysis.scores["0.weight"][0, 0].item())
    assert metric.log10_value == pytest.approx(analysis.log10_path_norm + share, abs=1e-4)
    ends = [metric.log10_lower, metric.log10_upper]
    assert ends == pytest.approx([metric.log10_value] * 2, rel=1e-9) and ends[0] > 100
    with torch.no_grad():
        for layer in [*model, *other]:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(1e5)
    with pytest.raises(FloatingPointError, match="rescale their neurons"):
        fxpath.path_metric(model, other)


@pytest.mark.parametrize("size", [1e-150, 1e-200])
def test_products_below_float64_are_refused(size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] = 0
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.mul_(size)
    for compare in (fxpath.path_metric, fxpath.lipschitz_bound):
        with pytest.raises(FloatingPointError, match="rescale their neurons"):
            compare(model, other)


def test_changes_near_rounding_stay_below_the_bound_through_m() -> None:
    """One path grows, one shrinks, by less than what domination grants to rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] *= 1 + 1e-13
        other[0].weight[1, 0] *= 1 - 1e-13
    metric = fxpath.path_metric(model, other)
    phi, changed = (fxpath.path_lifting(each).phi for each in (model, other))
    true = (phi - changed).abs().sum().item()
    assert metric.lower <= true * (1 + 1e-2) and metric.upper >= true * (1 - 1e-2)


def test_a_resnet_after_rounding() -> None:
    model = build("resnet").eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().max() / 7
                parameter.copy_((parameter / step).trunc() * step)
    metric = fxpath.path_metric(model, other, (3, 33, 33))
    assert metric.exact and 0 < metric.relative < 1
    norms = [fxpath.path_norm(m, (3, 33, 33), dtype=torch.float64) for m in (model, other)]
    assert metric.value == pytest.approx(norms[0] - norms[1], rel=1e-9)


# Networks that hold their weights in another way ---------------------------------------


def test_pruned_and_fused_and_parametrized_models_are_compared_by_what_they_use() -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).double(),
        weights=True,
    ).eval()
    shape = (2, 4, 4)
    fused = nn.Sequential(fuse_conv_bn_eval(model[0], model[1]), *list(model)[2:])
    assert fxpath.path_metric(model, fused, shape).upper < 1e-12 * fxpath.path_norm(model, shape)

    pruned = copy.deepcopy(model)
    prune.random_unstructured(pruned[4], "weight", amount=7)
    metric = fxpath.path_metric(model, pruned, shape)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain[4].weight.copy_(pruned[4].weight)
    assert metric.exact and metric.value > 0
    assert metric.value == fxpath.path_metric(model, plain, shape).value
    assert metric.value == fxpath.path_metric(model, plain.state_dict(), shape).value

    normed = copy.deepcopy(model)
    parametrizations.weight_norm(normed[4])
    assert fxpath.path_metric(model, normed, shape).upper < 1e-12 * fxpath.path_norm(model, shape)
    program = torch.export.export(plain, (torch.zeros(1, *shape, dtype=torch.float64),))
    assert metric.value == fxpath.path_metric(model, program, shape).value


def test_what_was_evaluated_stays_and_what_was_not_is_refused_when_a_model_changes() -> None:
    model = lenet()
    other = changed(model, "close", 0)
    evaluated = fxpath.path_metric(model, other, (1, 14, 14))
    late = fxpath.path_metric(model, other, (1, 14, 14))
    bound = fxpath.lipschitz_bound(model, other, (1, 14, 14))
    expected = evaluated.upper
    assert late.lower == evaluated.lower
    other[3].weight.data[0, 0, 0, 0] += 1
    assert evaluated.upper == expected and late.path_norm == evaluated.path_norm
    for late_number in (lambda: late.upper, bound.search):
        with pytest.raises(RuntimeError, match="3.weight of the other changed"):
            late_number()
    other[3].weight.data[0, 0, 0, 0] -= 1
    other[3].weight.data.copy_(changed(lenet(), "close", 0)[3].weight)
    assert late.upper == expected


def test_tied_weights_and_buffers_that_no_state_dict_holds() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.register_buffer("offset", torch.tensor([1.0, -2.0, 0.5]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x) + self.offset))

    model = Tied()
    state = {key: value / 2 for key, value in model.state_dict().items()}
    assert fxpath.path_metric(model, state).exact
    state["second.weight"] = state["second.weight"] * 2
    with pytest.raises(ValueError, match="first.weight, second.weight are one tensor"):
        fxpath.path_metric(model, state)


# Errors -------------------------------------------------------------------------------


def test_state_dicts_of_other_models_are_refused() -> None:
    model = lenet()
    state = model.state_dict()
    missing = {key: value for key, value in state.items() if key != "3.weight"}
    with pytest.raises(ValueError, match="missing: 3.weight"):
        fxpath.path_metric(model, missing, (1, 14, 14))
    with pytest.raises(ValueError, match="unexpected: 11.weight"):
        fxpath.path_metric(model, {**state, "11.weight": torch.ones(1)}, (1, 14, 14))
    with pytest.raises(ValueError, match=r"of another shape: 9.bias \(4, not 3\)"):
        fxpath.path_metric(model, {**state, "9.bias": torch.ones(4)}, (1, 14, 14))
    with pytest.raises(ValueError, match="other: NaN or infinite entries in 9.bias"):
        fxpath.path_metric(model, {**state, "9.bias": torch.full((3,), math.nan)}, (1, 14, 14))
    with pytest.raises(TypeError, match="other is a str"):
        fxpath.path_metric(model, "weights.pt", (1, 14, 14))


def test_other_architectures_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    wider = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    leaky = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(2.0), nn.Flatten(), nn.Linear(8, 2))
    longer = nn.Sequential(*model, nn.Linear(2, 2))
    steeper = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(3.0), nn.Flatten(), nn.Linear(8, 2))
    for other, match in (
        (wider, "conv2d.* of 0"),
        (leaky, "leaky_relu"),
        (longer, "another architecture"),
    ):
        with pytest.raises(ValueError, match=match):
            fxpath.path_metric(model, other, (1, 4, 4))
    with pytest.raises(ValueError, match="leaky_relu.*3.0"):
        fxpath.path_metric(leaky, steeper, (1, 4, 4))
    broken = copy.deepcopy(model)
    broken[3].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite entries in 3.weight"):
        fxpath.path_metric(model, broken, (1, 4, 4))
    variance = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    negative = copy.deepcopy(variance)
    negative[1].running_var.fill_(-1.0)
    with pytest.raises(ValueError, match="running variance"):
        fxpath.path_metric(variance, negative, (1, 4, 4))


def test_slopes_coefficients_and_selections_are_architecture() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.prelu = nn.Linear(3, 3), nn.PReLU(3)
            self.register_buffer("factor", torch.tensor([1.0, 2.0, 3.0]))
            self.register_buffer("order", torch.tensor([2, 0, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.prelu(self.linear(x)) * self.factor)[:, self.order]

    model = Scaled()
    for name, value in (
        ("prelu.weight", torch.tensor([0.25, 0.3, 0.25])),
        ("factor", torch.tensor([1.0, 2.0, 4.0])),
    ):
        state = {**model.state_dict(), name: value}
        with pytest.raises(ValueError, match=f"{name} differ: slopes"):
            fxpath.path_metric(model, state)
    state = {**model.state_dict(), "order": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="order select entries"):
        fxpath.path_metric(model, state)
    with pytest.raises(KeyError, match="no upper bound"):
        fxpath.path_metric(model, model).bound("m_raw")


def test_reports() -> None:
    model = lenet()
    other = changed(model, "close", 0)
    metric = fxpath.path_metric(model, other, (1, 14, 14))
    text, data = str(metric), metric.to_dict()
    assert "at least (6)" in text and "path-norm" in text
    assert data["value"] is None and set(data["bounds"]) == {"m", *INVARIANT}
    assert metric.log10_value is None
    exact = fxpath.path_metric(model, changed(model, "pruned", 0), (1, 14, 14))
    assert "exact (7)" in str(exact) and exact.to_dict()["exact"] is True


def test_a_network_without_paths_loses_nothing() -> None:
    model = lenet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    metric = fxpath.path_metric(model, model, (1, 14, 14))
    assert metric.value == 0 and metric.relative == metric.relative_lower == 0
