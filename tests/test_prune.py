"""Masks and their certificates: against enumeration, path_metric, and the same after rescaling."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpath
from fxpath.pruning.selection import cut, cut_capped
from tests.oracles.networks import Net
from tests.support.generated import MAX_PATHS, bounded, nets
from tests.support.nets import randomize
from tests.support.pruning import SHAPE, cut_entries, entries_of, net
from tests.support.zoo import build


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
    shares = criterion == "path_magnitude"
    function = fxpath.criteria.path_shares if shares else getattr(fxpath.criteria, criterion)
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
        with warnings.catch_warnings():
            # A layer of one weight is cut altogether, and behind another path that is no error.
            warnings.filterwarnings("ignore", ".*cut altogether", UserWarning)
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
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_masks_do_not_depend_on_powers_of_two(name: str) -> None:
    model, shape = build(name), (3, 32, 32)
    other = fxpath.rescale(model, shape, choices=(1, 2, 0.25), seed=1)
    assert any(not torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())
    scores = [fxpath.criteria.path_shares(m, shape) for m in (model, other)]
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    count = sum(scores[0][n].numel() for n in names) // 50
    cuts = [cut({n: s[n] for n in names}, count) for s in scores]
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
    assert "cut altogether" in str(pruned)
    capped = fxpath.prune(model, 0.5, (6,), max_layer_sparsity=0.9)
    assert capped.masks["short.weight"].any() and "cut altogether" not in str(capped)


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
