"""Masks and their certificates: against enumeration, path_metric, and the same after rescaling."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from fxpath.pruning.selection import cut, cut_capped
from tests.enumeration import Net
from tests.reference import randomize
from tests.test_enumeration import MAX_PATHS, bounded, nets
from tests.zoo import build

SHAPE = (3, 9, 9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return randomize(model, 0)


def cut_entries(pruned: fxpath.Pruned) -> set[tuple[str, int]]:
    return entries_of(pruned.masks)


def entries_of(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {
        (name, place)
        for name, mask in masks.items()
        for place in (~mask).flatten().nonzero()[:, 0].tolist()
    }


def ranking(scores: dict[str, Tensor]) -> list[tuple[str, int]]:
    """The slow way: all entries in one sorted list."""
    ranked = sorted(
        (float(value) + 0.0, name, place)
        for name, score in scores.items()
        for place, value in enumerate(score.double().flatten().tolist())
    )
    return [(name, place) for _, name, place in ranked]


def lowest(scores: dict[str, Tensor], count: int) -> set[tuple[str, int]]:
    return set(ranking(scores)[:count])


def weights(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: score for name, score in scores.items() if name.endswith("weight")}


# What is cut --------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0, 1, 0.1, 0.5, 300, 0.7])
def test_the_lowest_scores_go_exactly_as_many_as_asked_for(amount: float) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    pruned = fxpath.prune(model, amount, SHAPE)
    scores = weights(fxpath.analyze(model, SHAPE).scores)
    entries = sum(score.numel() for score in scores.values())
    count = round(amount * entries) if isinstance(amount, float) else amount
    assert cut_entries(pruned) == lowest(scores, count)
    assert pruned.state_dict.keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        mask = pruned.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(pruned.state_dict[name], torch.where(mask, value, 0))
        assert pruned.state_dict[name].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("criterion", ["path_magnitude", "canonical_magnitude", "magnitude"])
def test_every_criterion_has_a_name_scores_and_a_function(criterion: str) -> None:
    model = net()
    named = fxpath.prune(model, 0.4, SHAPE, criterion=criterion)
    shape = () if criterion == "magnitude" else (SHAPE,)
    function = getattr(fxpath.criteria, criterion)
    given_ = fxpath.prune(model, 0.4, SHAPE, criterion=function(model, *shape))
    called = fxpath.prune(model, 0.4, SHAPE, criterion=lambda m: function(m, *shape))
    assert cut_entries(named) == cut_entries(given_) == cut_entries(called)
    assert named.criterion == criterion and called.criterion == "custom"


@given(st.integers(0, 10**6))
@bounded(200)
def test_ranking_is_that_of_a_sorted_list(seed: int) -> None:
    """Ties, zeros of either sign, several formats, infinities; with caps and without."""
    generator = torch.Generator().manual_seed(seed)
    formats = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    scores, caps = {}, {}
    for i in range(1 + seed % 4):
        size = (1, 3, 17, 90)[(seed // 7 + i) % 4]
        score = torch.randn(size, generator=generator) * 10.0 ** (-3 * (seed % 2))
        score = (2 * score).round() if seed % 3 else score
        score.masked_fill_(score == 0, (-0.0, 0.0)[i % 2])
        score[0] = (math.inf, -math.inf, 1e-30)[seed % 3]
        name = f"layer {(5 * i + seed) % 11}"
        scores[name] = score.to(formats[(seed // 3 + i * (seed % 2)) % 4])
        caps[name] = (seed * (i + 1)) % (len(score) + 1)
    count = seed % (1 + sum(map(len, scores.values())))
    found = cut(scores, count)
    masks = {name: found.kept(name, score) for name, score in scores.items()}
    assert entries_of(masks) == set(ranking(scores)[:count])

    count = seed % (1 + sum(caps.values()))
    cuts = cut_capped(scores, count, caps)
    masks = {name: cuts[name].kept(name, score) for name, score in scores.items()}
    left, expected = dict(caps), set()
    for name, place in ranking(scores):
        if left[name] and len(expected) < count:
            left[name] -= 1
            expected.add((name, place))
    assert entries_of(masks) == expected


def test_scope_and_cap_hold_in_every_layer() -> None:
    model = net()
    layered = fxpath.prune(model, 0.3, SHAPE, scope="layer")
    for row in layered.layers:
        count = round(0.3 * math.prod(row.shape))
        assert row.pruned == count and row.requested == count / math.prod(row.shape)
    for name, score in weights(fxpath.analyze(model, SHAPE).scores).items():
        cut = {entry for entry in cut_entries(layered) if entry[0] == name}
        assert cut == lowest({name: score}, len(cut))
    counted = fxpath.prune(model, 20, SHAPE, scope="layer")
    assert [row.pruned for row in counted.layers] == [20, 20, 20]
    capped = fxpath.prune(model, 0.6, SHAPE, max_layer_sparsity=0.61)
    assert all(row.pruned <= math.ceil(0.61 * math.prod(row.shape)) for row in capped.layers)
    total = sum(math.prod(row.shape) for row in capped.layers)
    assert len(cut_entries(capped)) == round(0.6 * total)
    assert cut_entries(capped) != cut_entries(fxpath.prune(model, 0.6, SHAPE))
    with pytest.raises(ValueError, match="max_layer_sparsity leaves"):
        fxpath.prune(model, 0.6, SHAPE, max_layer_sparsity=0.3)


def test_include_and_exclude_choose_by_name_and_type() -> None:
    model = net()
    assert list(fxpath.prune(model, 0.1, SHAPE, include="[03].*").masks) == ["0.weight", "3.weight"]
    assert list(fxpath.prune(model, 0.1, SHAPE, include=[nn.Linear]).masks) == ["7.weight"]
    assert list(fxpath.prune(model, 0.1, SHAPE, exclude=(nn.Linear, "0.*")).masks) == ["3.weight"]
    # The bias in front of the batch norm is a part of another one.
    with_biases = fxpath.prune(model, 0.1, SHAPE, biases=True)
    assert list(with_biases.masks) == ["0.weight", "3.weight", "3.bias", "7.weight", "7.bias"]
    for wrong, words in [({"include": "8.*"}, "8"), ({"exclude": nn.Conv1d}, "Conv1d")]:
        with pytest.raises(ValueError, match=f"{words}.* matches no parameter"):
            fxpath.prune(model, 0.1, SHAPE, **wrong)
    with pytest.raises(ValueError, match="nothing is left"):
        fxpath.prune(model, 0.1, SHAPE, exclude="*")


def test_steps_score_what_is_left() -> None:
    model = net()
    steps = fxpath.prune(model, 0.6, SHAPE, steps=3)
    state, count = copy.deepcopy(model), round(0.6 * 632)
    done: set[tuple[str, int]] = set()
    for step in (1, 2, 3):
        scores = weights(fxpath.analyze(state, SHAPE).scores)
        for name, place in done:
            scores[name].flatten()[place] = -1
        done = lowest(scores, round(count * step / 3))
        with torch.no_grad():
            for name, place in done:
                state.get_parameter(name).view(-1)[place] = 0
    assert cut_entries(steps) == done
    assert cut_entries(steps) != cut_entries(fxpath.prune(model, 0.6, SHAPE))
    # Magnitudes of what is left are what they were.
    once, again = (fxpath.prune(model, 0.6, SHAPE, criterion="magnitude", steps=k) for k in (1, 3))
    assert cut_entries(once) == cut_entries(again)


# What is lost -------------------------------------------------------------------------


@given(nets(), st.integers(0, 10**6))
@bounded(20)
def test_the_certificate_is_the_enumerated_metric(network: Net, seed: int) -> None:
    model = network.module()
    dag = network.dag(model)
    assume(0 < dag.count_paths() < MAX_PATHS)
    inputs = tuple(torch.zeros(1, *shape, dtype=torch.float64) for shape in network.input_shapes)
    noise = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(p.shape, generator=noise) for n, p in model.named_parameters()}
    try:
        pruned = fxpath.prune(model, 0.2, criterion=scores, example_inputs=inputs)
    except ValueError as error:
        # Small networks have outputs that hang on one weight, or no weights.
        assert "no path from an input" in str(error) or "nothing is left" in str(error)
        return
    lost = np.abs(dag.phi() - network.dag(pruned.model()).phi()).sum()
    metric = pruned.certificate
    assert metric.exact and metric.value == pytest.approx(float(lost), rel=1e-9, abs=1e-12)
    assert metric.lower <= metric.value <= metric.upper
    assert metric.relative <= pruned.path_magnitude_share * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("amount", [0, 0.2, 0.6])
def test_the_certificate_is_that_of_path_metric(amount: float) -> None:
    model = net()
    pruned = fxpath.prune(model, amount, SHAPE)
    metric = fxpath.path_metric(model, pruned.model(), SHAPE)
    assert pruned.certificate.value == pytest.approx(metric.value, rel=1e-12)
    assert pruned.certificate.path_norm == pytest.approx(metric.path_norm, rel=1e-12)
    sums = metric.path_magnitude_sum / metric.path_norm
    assert pruned.path_magnitude_share == pytest.approx(sums, rel=1e-4)
    for name, bound in metric.bounds.items():
        assert pruned.certificate.bound(name) == pytest.approx(bound, rel=1e-9), name


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (0.002, {}),
        (0.4, {}),
        (0.05, {"criterion": "magnitude"}),
        (0.05, {"layer_adaptive": True, "max_layer_sparsity": 0.2}),
    ],
)
def test_a_budget_is_kept_and_one_more_entry_would_exceed_it(
    budget: float, options: dict[str, Any]
) -> None:
    model = net()
    pruned = fxpath.prune(model, budget=budget, input_shape=SHAPE, **options)
    count = len(cut_entries(pruned))
    assert pruned.certificate.relative <= budget
    assert count > 0 or budget < 0.01
    more = fxpath.prune(model, count + 1, SHAPE, **options)
    assert more.certificate.relative > budget
    assert cut_entries(pruned) < cut_entries(more)


def test_budgets_at_their_ends_and_in_steps() -> None:
    model = net()
    assert not cut_entries(fxpath.prune(model, budget=0.0, input_shape=SHAPE))
    stepped = fxpath.prune(model, budget=0.1, input_shape=SHAPE, steps=3)
    assert stepped.certificate.relative <= 0.1
    once = fxpath.prune(model, budget=0.1, input_shape=SHAPE)
    assert cut_entries(stepped) != cut_entries(once) and len(cut_entries(stepped)) > 100
    with pytest.raises(ValueError, match="no path from an input would reach channel 0"):
        fxpath.prune(model, budget=1.5, input_shape=SHAPE)
    # Entries on no path cost nothing.
    with torch.no_grad():
        model[7].weight[:, :4] = 0
    free = fxpath.prune(model, budget=0.0, input_shape=SHAPE)
    assert free.certificate.value == 0 and not free.masks["3.weight"][0].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_masks_do_not_depend_on_powers_of_two(name: str) -> None:
    model, shape = build(name), (3, 32, 32)
    other = fxpath.rescale(model, shape, choices=(1, 2, 0.25), seed=1)
    assert any(not torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())
    scores = [fxpath.criteria.path_magnitude(m, shape) for m in (model, other)]
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    cuts = [cut({n: s[n] for n in names}, 10**5) for s in scores]
    for n in names:
        masks = [c.kept(n, s[n]) for c, s in zip(cuts, scores, strict=True)]
        assert torch.equal(*masks), n


def test_masks_and_what_is_lost_are_invariant() -> None:
    model = net()
    other = fxpath.rescale(model, SHAPE, choices=(1, 2, 0.25), seed=1)
    for options in (
        {},
        {"criterion": "canonical_magnitude"},
        {"steps": 2},
        {"layer_adaptive": True},
    ):
        ours, theirs = (fxpath.prune(m, 0.3, SHAPE, **options) for m in (model, other))
        assert cut_entries(ours) == cut_entries(theirs)
        assert ours.certificate.relative == pytest.approx(theirs.certificate.relative, rel=1e-9)
    magnitudes = [fxpath.prune(m, 0.3, SHAPE, criterion="magnitude") for m in (model, other)]
    assert cut_entries(magnitudes[0]) != cut_entries(magnitudes[1])


# What is reported and refused ---------------------------------------------------------


def residual() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.short, self.end = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(torch.relu(self.main(x)) + 1e-4 * self.short(x))

    return randomize(Block(), 3)


def test_a_layer_that_is_cut_altogether_is_reported() -> None:
    model = residual()
    with pytest.warns(UserWarning, match=r"^short.weight: cut altogether"):
        pruned = fxpath.prune(model, 0.5, (6,))
    assert [row.empty for row in pruned.layers] == [False, True, False]
    assert "cut altogether" in pruned.table()
    capped = fxpath.prune(model, 0.5, (6,), max_layer_sparsity=0.9)
    assert capped.masks["short.weight"].any() and "cut altogether" not in capped.table()


def test_outputs_that_nothing_reaches_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    scores = {"0.weight": torch.ones(3, 2), "2.weight": torch.tensor([[1.0] * 3, [0.0] * 3])}
    with pytest.raises(ValueError, match="would reach channel 1 of output 0: prune less"):
        fxpath.prune(model, 3, (2,), criterion=scores)
    with torch.no_grad():  # an output that was cut off before is the model's own business
        model[2].weight[1] = 0
    assert len(cut_entries(fxpath.prune(model, 3, (2,), criterion=scores))) == 3
    with pytest.raises(ValueError, match="0.weight, 2.weight would be cut altogether"):
        fxpath.prune(model, 1.0, (2,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of amount, budget and pattern"),
        ({"amount": 0.1, "budget": 0.1}, "exactly one"),
        ({"pattern": fxpath.NM(2, 4), "amount": 0.5}, "exactly one"),
        ({"amount": 1.5}, "between 0.0 and 1.0"),
        ({"amount": -1}, "there are 632 entries"),
        ({"amount": 633}, "there are 632 entries"),
        ({"budget": -0.1}, "at least 0"),
        ({"budget": math.nan}, "at least 0"),
        ({"budget": 0.1, "scope": "layer"}, "scope"),
        ({"amount": 0.1, "scope": "local"}, "local"),
        ({"amount": 0.1, "steps": 0}, "at least 1"),
        ({"amount": 0.1, "max_layer_sparsity": 1.0}, "below 1"),
        ({"amount": 0.1, "criterion": "size"}, "there are path_magnitude"),
        ({"amount": 0.1, "criterion": "obd"}, "needs data"),
        ({"amount": 0.1, "criterion": {}}, "no scores for 0.weight, 3.weight, 7.weight"),
        ({"amount": 0.1, "steps": 2, "criterion": {}}, "stay what they are"),
        ({"pattern": fxpath.NM(2, 4), "steps": 2}, "do not go with it"),
        ({"pattern": fxpath.NM(2, 7)}, "no layer can have the pattern 2:7: 0.weight: 3 input"),
    ],
)
def test_arguments_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fxpath.prune(net(), input_shape=SHAPE, **options)


def test_scores_and_types_are_checked() -> None:
    model = net()
    scores = dict(fxpath.criteria.magnitude(model))
    for name, wrong, words in [
        ("3.weight", torch.zeros(2), r"3.weight has shape \(2,\)"),
        ("0.weight", torch.full((8, 3, 3, 3), math.nan), "0.weight has NaN"),
        ("7.weight", torch.zeros(4, 32, dtype=torch.int64), "7.weight is no floating-point"),
    ]:
        with pytest.raises(ValueError, match=words):
            fxpath.prune(model, 0.1, SHAPE, criterion={**scores, name: wrong})
    for options in (
        *({"amount": True}, {"amount": "0.1"}, {"amount": 0.1, "criterion": 3}),
        *({"budget": "0.1"}, {"budget": True}, {"amount": 0.1, "max_layer_sparsity": "0.5"}),
        *({"amount": 0.1, "include": 3}, {"pattern": "2:4"}),
    ):
        words = "amount|criterion|budget=|max_layer_sparsity=|3: pass names|pass an fxpath.NM"
        with pytest.raises(TypeError, match=words):
            fxpath.prune(model, input_shape=SHAPE, **options)
    exported = torch.export.export(model.eval(), (torch.zeros(1, *SHAPE),))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fxpath.prune(exported, 0.1)


# Other ways to hold weights -----------------------------------------------------------


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
    table = pruned.table()
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
