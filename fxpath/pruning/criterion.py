"""Scores to prune by: a criterion by name, the caller's own scores, or a function of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxpath import criteria
from fxpath.model import Given
from fxpath.pruning.eligible import Eligible
from fxpath.sharding import whole

Scores = Mapping[str, Tensor]
Criterion = str | Scores | Callable[..., Scores]

#: Criteria that need nothing but a model.
_BY_NAME: dict[str, Callable[..., Scores]] = {
    "path_magnitude": criteria.path_shares,
    "canonical_magnitude": criteria.canonical_magnitude,
    "magnitude": criteria.magnitude,
}


def name_of(criterion: Criterion) -> str:
    """The criterion's name, ``"custom"`` for scores and functions.

    Raises:
        ValueError: for a name that is unknown, or that needs more than a model.
        TypeError: for what is no criterion.
    """
    if isinstance(criterion, str):
        if criterion == "obd":
            raise ValueError(
                'criterion="obd" needs data: pass its scores, '
                "criterion=fxpath.criteria.obd(model, loss, batch)"
            )
        if criterion not in _BY_NAME:
            raise ValueError(f"criterion={criterion!r}: there are {', '.join(_BY_NAME)}")
        return criterion
    if not isinstance(criterion, Mapping) and not callable(criterion):
        raise TypeError(
            f"criterion is a {type(criterion).__name__}: pass a name, scores by parameter name, or "
            "a function of the model that returns such scores"
        )
    return "custom"


def all_scores(criterion: Criterion, model: nn.Module, given: Given) -> Scores:
    """The scores that a criterion gives.

    Args:
        criterion: as for :func:`name_of`; a function is told of ``given`` what it has arguments
            for.
        model: the model.
        given: what the caller says about inputs.

    Raises:
        TypeError: if a function returns no scores by name.
        ValueError: as :func:`name_of`.
    """
    if isinstance(criterion, Mapping):
        return criterion
    name = name_of(criterion)
    function = _BY_NAME[name] if isinstance(criterion, str) else criterion
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    told = {k: v for k, v in given.told().items() if takes_all or k in parameters}
    found = function(model, **told)
    if not isinstance(found, Mapping):
        raise TypeError(f"the criterion returned a {type(found).__name__}, not scores by name")
    return found


def scores_of(
    criterion: Criterion, model: nn.Module, given: Given, chosen: Sequence[Eligible]
) -> dict[str, Tensor]:
    """Scores of the entries that may be pruned."""
    return checked_scores(all_scores(criterion, model, given), chosen)


def checked_scores(found: Scores, chosen: Sequence[Eligible]) -> dict[str, Tensor]:
    """Those scores that are needed.

    Raises:
        ValueError: naming every parameter without a score, or with one of another shape, of
            integers, or with NaN.
    """
    missing = [each.name for each in chosen if each.name not in found]
    if missing:
        raise ValueError(
            f"the criterion has no scores for {', '.join(missing)}: add them, or spare these "
            "parameters with exclude"
        )
    scores = {each.name: found[each.name] for each in chosen}
    for each in chosen:
        score = scores[each.name]
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise ValueError(f"the score of {each.name} is no floating-point tensor")
        if tuple(score.shape) != each.shape:
            raise ValueError(
                f"the score of {each.name} has shape {tuple(score.shape)}, the parameter "
                f"{each.shape}"
            )
        if score.numel() and bool(torch.isnan(whole(score).amin())):
            raise ValueError(f"the score of {each.name} has NaN: nothing can be ranked by that")
    return scores
