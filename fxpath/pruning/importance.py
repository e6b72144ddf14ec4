"""How important channels are: sums of scores of the entries that lead into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxpath.pruning.channels import Channels
from fxpath.pruning.criterion import Scores


def channel_importance(found: Channels, scores: Scores) -> Tensor:
    """Sum of the scores of the entries that lead into each channel, float64, ``[channels]``.

    Every path that is lost with channels enters them once by such an entry, so that for Path-Mag
    the sum over a unit is an upper bound of the path-norm that is lost with it.  Weights from a
    channel to one that goes with it (depthwise convolutions, batch norms) are not counted, as what
    runs through them entered before, unless a clamp stands in between, whose bounds enter there.

    Raises:
        ValueError: naming layers without a score, scores of another shape or that are no numbers.
    """
    missing = [name for name in _needed(found) if name not in scores]
    if missing:
        raise ValueError(
            f"no scores for {', '.join(missing)}: a criterion must score every layer whose "
            "channels it ranks"
        )
    total = torch.zeros(found.count, dtype=torch.float64)
    counted: set[tuple[str, tuple[int, ...]]] = set()
    for name, out, into in found.scored:
        # The scores of a weight are those of all its uses, which are tied by their positions.
        key = name, _varying(out)
        if name in scores and not _inside(found, name, out, into) and key not in counted:
            counted.add(key)
            total += _summed(name, scores[name], out, found.count)
    return total


def _needed(found: Channels) -> list[str]:
    needed = {
        name: None
        for name, out, into in found.scored
        if name in found.outputs and not _inside(found, name, out, into) and bool((out > 0).any())
    }
    return list(needed)


def _inside(found: Channels, name: str, out: Tensor, into: Tensor | None) -> bool:
    """Whether each entry leads from a channel to one that it is tied to, and is no way in."""
    if into is None or bool(found.clamped[into].any()):
        return False
    if name in found.grouped:
        return not found.grouped[name][0].balanced
    return len(_varying(out)) == 1 and _varying(out) == _varying(into)


def _varying(side: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(side.shape) if size > 1)


def _summed(name: str, score: Any, out: Tensor, count: int) -> Tensor:
    fits = isinstance(score, Tensor) and score.dim() == out.dim()
    if not fits or any(n not in (1, m) for n, m in zip(out.shape, score.shape, strict=True)):
        raise ValueError(f"the scores of {name} have not the parameter's shape")
    if not bool(score.isfinite().all()):
        raise ValueError(f"the scores of {name} are not all finite numbers")
    alike = [axis for axis, size in enumerate(out.shape) if size == 1]
    score = score.detach().cpu()
    mass = score.sum(alike, keepdim=True, dtype=torch.float64) if alike else score.double()
    channels, mass = (x.expand(torch.broadcast_shapes(out.shape, mass.shape)) for x in (out, mass))
    there = channels > 0
    return torch.zeros(count, dtype=torch.float64).index_add(0, channels[there], mass[there])
