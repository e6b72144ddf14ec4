"""Masks for a model by a criterion, with the exact path-metric of what they cut."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpath.criteria import relative_to_layer
from fxpath.model import Given, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.erasure import Erasure
from fxpath.passes.followed import gated
from fxpath.pruning.choices import Choice
from fxpath.pruning.criterion import Criterion, name_of
from fxpath.pruning.eligible import Eligible, check_stored, choose, find_eligible
from fxpath.pruning.goal import Goal, decided
from fxpath.pruning.masks import held_masks
from fxpath.pruning.patterns import NM, refused
from fxpath.pruning.pruned import Pruned, PrunedLayer
from fxpath.pruning.source import Source
from fxpath.sharding import placed, whole


@plain_mode()
@torch.no_grad()
def prune(
    model: nn.Module,
    amount: float | None = None,
    input_shape: Shapes = None,
    *,
    criterion: Criterion = "path_magnitude",
    scope: str = "global",
    layer_adaptive: bool = False,
    pattern: NM | None = None,
    budget: float | None = None,
    include: Choice | None = None,
    exclude: Choice = (),
    steps: int = 1,
    max_layer_sparsity: float | None = None,
    biases: bool = False,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> Pruned:
    """Choose entries of a model to set to zero, and certify what is lost.

    The entries with the lowest scores go (the paper's section 4.3): by default those with the least
    Path-Mag (10), which no rescaling of neurons changes.  What is lost, ``||Phi(theta) -
    Phi(theta')||_1``, is known exactly by (7), whatever the criterion.

    Eligible are the weights of convolutions and linear maps, under the names of their scores, and
    biases that no batch normalization follows if ``biases`` is true.  Entries that are zero already
    count, and come first by most criteria: pruning a model that is pruned to 40 % by 40 % changes
    nothing.

    One threshold for all layers treats them differently: on ResNets 40 % empties shortcut
    convolutions whole, and in a network without skip connections a layer that is cut altogether
    cuts the outputs off.  The first is a warning, and a line in the table, the second an error.
    ``max_layer_sparsity`` prevents the first and mostly the second; ``scope="layer"`` is the better
    choice where layers are of one kind, or where a runtime gains from evenly spread zeros.

    Args:
        model: a module, in either mode; it is not changed.  The function is that of eval mode.
            With sharded parameters every rank makes the call, and gets its part of the same masks.
        amount: how much to cut: a share (float in [0, 1]) or a number (int) of the eligible
            entries, as in ``torch.nn.utils.prune``.
        input_shape: as for :func:`fxpath.analyze`.
        criterion: ``"path_magnitude"``, ``"canonical_magnitude"`` or ``"magnitude"``; scores by
            parameter name, higher = kept (all eligible ones); or a function of the model that
            returns such scores, and that is told ``input_shape`` and the like if it has arguments
            of these names.
        scope: ``"global"`` ranks the entries of all layers together, ``"layer"`` cuts ``amount``
            in each parameter.
        layer_adaptive: rank by :func:`fxpath.criteria.relative_to_layer` of the scores.
        pattern: an :class:`fxpath.NM`, along the input channels of each filter tap, in place of
            ``amount``.  Layers whose input channels are no multiple of its length stay as they
            are, with the reason in their row.
        budget: in place of ``amount``: the largest exact relative path-metric that may be lost
            (0.01 = 1 % of the path-norm); as many entries go as it allows.
        include: names of parameters, or of modules with all that is in them (with ``*`` as in
            ``fnmatch``), and types of modules, to choose from; all that is eligible by default.
        exclude: those to spare.
        steps: in how many steps the amount or the budget is reached, with scores of the network
            pruned so far at each.
        max_layer_sparsity: the largest share of one parameter to cut, in [0, 1); rounded up to
            whole entries, but never all.
        biases: whether biases are eligible.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`: what lies behind is not pruned.
        outputs: as for :func:`fxpath.analyze`.
        gates: take gates in, as for :func:`fxpath.analyze`: entries that no path crosses stay as
            they are, since a gate may read them; there is no exact certificate, and ``bound`` says
            how far outputs can be apart.

    Returns:
        A :class:`fxpath.Pruned`.  Ties are settled by (score, name, flat index).

    Warns:
        UserWarning: naming parameters that are cut altogether.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        TypeError: for a model, an amount or a criterion of another kind.
        ValueError: unless exactly one of ``amount``, ``budget`` and ``pattern`` is given; for an
            argument that is out of range, unknown, or does not go with another one; for scores that
            are missing, by name; for weights that are computed (parametrized), or that the model
            computes other numbers from, by name; for outputs that no path from an input would
            reach, by name.
        FloatingPointError: if a neuron's path-norm is not within 1e-270 ... 1e300.

    Example:
        >>> import fxpath
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> pruned = fxpath.prune(model, 0.25)
        >>> sum(int((~mask).sum()) for mask in pruned.masks.values())
        3
        >>> pruned.certificate.exact
        True
        >>> fxpath.prune(model, budget=0.05).certificate.relative <= 0.05
        True
    """
    goal = Goal(amount, budget, pattern, scope, max_layer_sparsity, steps)
    goal.check()
    named = name_of(criterion)
    if steps > 1 and isinstance(criterion, Mapping):
        raise ValueError("steps: given scores stay what they are; pass a criterion or a function")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: an nn.Module can be pruned")
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    erasure = Erasure.of(model, given)
    inexact = gated(erasure.program.lifted)
    if budget is not None and inexact:
        raise ValueError(
            "budget: with gates, which change with the weights, no path-metric says what is lost; "
            "pass amount, and look at the bound of the result"
        )
    eligible = find_eligible(erasure.program.captured, erasure.program.lifted, biases)
    chosen = choose(model, eligible, include, exclude)
    check_stored(model, erasure.side, chosen)
    notes = {each.name: refused(each, pattern) if pattern else "" for each in chosen}
    fitting = [each for each in chosen if not notes[each.name]]
    if not fitting:
        each = chosen[0]
        raise ValueError(
            f"no layer can have the pattern {pattern}: {each.name}: {notes[each.name]}"
        )

    source = Source(model, given, erasure, fitting)
    inputs = {each.name: each.inputs for each in fitting}
    masks: dict[str, Tensor] = {}
    # What no path crosses may be read by a gate all the same: Path-Mag says nothing of it.
    crossed = source.crossed() if inexact else {}
    for step in range(1, steps + 1):
        scores = source.scores(criterion, masks)
        if layer_adaptive and masks:
            # What a criterion says of entries that are cut is no part of what remains.
            scores = {n: _filled(s, masks[n], 0.0) for n, s in scores.items()}
        ranked = relative_to_layer(scores) if layer_adaptive else scores
        # Entries that are cut stay cut, also where others have come to nothing.
        if masks:
            ranked = {n: _filled(s, masks[n], -math.inf) for n, s in ranked.items()}
        ranked = {n: _filled(s, crossed[n], math.inf) if crossed else s for n, s in ranked.items()}
        masks = decided(goal, step, ranked, inputs, source.lost, source.estimated)
        _check_spared(masks, crossed)
    lost = source.path_magnitude_shares(masks, named == "path_magnitude" and steps == 1)
    tensors = source.erased(masks)
    held = held_masks(model)
    rows = [
        _row(each, goal, masks, tensors, held, notes[each.name], lost.get(each.name, 0.0))
        for each in chosen
    ]
    empty = [row.name for row in rows if row.empty]
    _check_reached(erasure.cut_off(tensors), empty)
    if empty:
        warnings.warn(
            f"{', '.join(empty)}: cut altogether, no path crosses it any more; max_layer_sparsity "
            'or scope="layer" prevents that',
            UserWarning,
            stacklevel=4,  # past the decorators
        )
    kept = {
        each.name: placed(torch.ones(each.shape, dtype=torch.bool), tensors[each.key])
        for each in chosen
        if each.name not in masks
    }
    return Pruned(
        state_dict=source.state(tensors),
        masks={each.name: {**masks, **kept}[each.name] for each in chosen},
        bound=erasure.bound(tensors) if inexact else None,
        path_magnitude_share=sum(lost.values()),
        layers=tuple(rows),
        criterion=named,
        _dense=model,
        _given=given,
        _certificate=None if inexact else erasure.certificate(tensors),
    )


def _filled(scores: Tensor, mask: Tensor, value: float) -> Tensor:
    """Scores with another value where a mask is false."""
    entries = whole(scores)
    return placed(entries.masked_fill(~whole(mask).to(entries.device), value), scores)


def _row(
    each: Eligible,
    goal: Goal,
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    note: str,
    lost: float,
) -> PrunedLayer:
    mask, left = masks.get(each.name), whole(tensors[each.key])
    if each.name in held:
        left = left * held[each.name]
    return PrunedLayer(
        name=each.name,
        shape=each.shape,
        requested=None if note else goal.share_of(each.entries),
        pruned=0 if mask is None else each.entries - int(whole(mask).count_nonzero()),
        sparsity=(each.entries - int(torch.count_nonzero(left))) / max(1, each.entries),
        lost=lost,
        note=note,
    )


def _check_spared(masks: Mapping[str, Tensor], crossed: Mapping[str, Tensor]) -> None:
    """Refuse masks that would cut what a gate may read, and Path-Mag does not weigh."""
    hit = [n for n, kept in crossed.items() if bool((~whole(masks[n]) & ~whole(kept)).any())]
    if hit:
        raise ValueError(
            f"{_first(hit)}: so much would cut entries that no path crosses, but a gate may read: "
            "prune less, without a pattern, or spare these parameters with exclude"
        )


def _check_reached(lost: Sequence[str], empty: Sequence[str]) -> None:
    """Refuse masks that leave an output without a path from an input."""
    if not lost:
        return
    because = f"; {_first(empty)} would be cut altogether" if empty else ""
    raise ValueError(
        f"no path from an input would reach {_first(lost)}{because}: prune less, or "
        'pass max_layer_sparsity or scope="layer"'
    )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
