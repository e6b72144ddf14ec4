"""What the numbers of an analysis say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxpath.program.coverage import summary
from fxpath.program.rows import LayerRow
from fxpath.program.spread import Spread

#: Part of the path mass below which nearly none of it crosses a layer.
LITTLE = 0.001

#: Scores concentrate where so much of a layer's mass lies on so few of its weights.
MOST, FEW = 0.9, 0.1

#: The largest part of all weights up to which it is news that pruning it empties a layer.
LATE = 0.9

#: How many layers a sentence names.
NAMED = 5

_REMOVABLE = "fxpath.remove_dead takes out those that can go, and the function stays the same."
_FED = "A gate may read them, and without them the function may be another one."


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Attributes:
        kind: ``"uncrossed"`` (layers that nearly no path mass crosses), ``"dead_channels"``,
            ``"concentrated"`` (few weights carry 90 % of a layer's mass), ``"emptied"`` (what
            global pruning by Path-Mag empties first) or ``"unscored"``.
        text: one or two sentences.
        layers: names of the layers, or parameters, the most striking one first.
        values: a number for each: the share; how many channels; the part of the weights that
            carries 90 %; the part of all weights that is pruned when it is empty; nothing.
    """

    kind: str
    text: str
    layers: tuple[str, ...]
    values: tuple[float, ...] = ()


def find(
    rows: Sequence[LayerRow],
    weights: Mapping[str, Spread],
    prunable: Sequence[str],
    unscored: Mapping[str, str],
    q: float,
    gated: bool = False,
) -> list[Finding]:
    """All findings of an analysis, each only where there is something to say.

    Args:
        rows: its layers.
        weights: how the shares of each layer's weights are spread, by layer name.
        prunable: layers whose weights global pruning ranks.
        unscored: parameters without a score, and why.
        q: exponent of the path-norm; Path-Mag, by which pruning ranks, has 1.
        gated: whether there are gates, which read what no path runs through as well.
    """
    found = (
        _uncrossed(rows, prunable),
        _dead(rows, gated),
        _concentrated(rows, {name: weights[name] for name in prunable}),
        _emptied({name: weights[name] for name in prunable}, gated) if q == 1 else None,
        Finding("unscored", sentence(summary(unscored)), tuple(unscored)) if unscored else None,
    )
    return [each for each in found if each is not None]


def _uncrossed(rows: Sequence[LayerRow], prunable: Sequence[str]) -> Finding | None:
    weighing = [row for row in rows if row["name"] in prunable and row["parameters"]]
    few = sorted((row["share"], row["name"]) for row in weighing if row["share"] < LITTLE)
    if not few:
        return None
    names = _named([f"{name} ({_percent(share)})" for share, name in few])
    text = (
        f"Nearly no path mass crosses {_count(len(few), 'layer')} of {len(rows)}: {names}. All "
        "weights of such a layer together carry no more."
    )
    return Finding("uncrossed", text, tuple(n for _, n in few), tuple(s for s, _ in few))


def _dead(rows: Sequence[LayerRow], gated: bool) -> Finding | None:
    dead = [row for row in rows if row["dead_channels"]]
    dead.sort(key=lambda row: -row["dead_channels"])
    if not dead:
        return None
    names = _named([f"{row['name']} ({row['dead_channels']} of {row['channels']})" for row in dead])
    count = sum(row["dead_channels"] for row in dead)
    text = f"No path runs through {_count(count, 'output channel')} of these layers: {names}. " + (
        _FED if gated else _REMOVABLE
    )
    values = tuple(float(row["dead_channels"]) for row in dead)
    return Finding("dead_channels", text, tuple(row["name"] for row in dead), values)


def _concentrated(rows: Sequence[LayerRow], weights: Mapping[str, Spread]) -> Finding | None:
    found = []
    for row in (row for row in rows if row["name"] in weights):
        spread = weights[row["name"]]
        if spread.entries and row["effective"]:
            part = spread.carrying(MOST) / spread.entries
            found += [(part, row["name"])] * (part <= FEW)
    if not found:
        return None
    found.sort()
    names = _named([f"{name} ({_percent(part)})" for part, name in found])
    text = (
        f"Scores concentrate in {_count(len(found), 'layer')}, where {MOST:.0%} of the mass lies "
        f"on few of the weights: {names}."
    )
    return Finding(
        "concentrated", text, tuple(name for _, name in found), tuple(part for part, _ in found)
    )


def _emptied(weights: Mapping[str, Spread], gated: bool) -> Finding | None:
    """Pruned by one threshold, a layer is empty when its largest score is below it."""
    total = sum(spread.entries for spread in weights.values())
    alive = {name: spread.largest for name, spread in weights.items() if spread.largest > 0}
    first = sorted(alive, key=lambda name: alive[name])[:NAMED]
    if len(weights) < 2 or not first:
        return None
    counts = [s.at_most([alive[name] for name in first]) for s in weights.values()]
    parts = [sum(each) / total for each in zip(*counts, strict=True)]
    found = [(part, name) for part, name in zip(parts, first, strict=True) if part <= LATE]
    if not found:
        return None
    names = ", ".join(f"{name} at {_percent(part)}" for part, name in found)
    text = (
        f"One threshold for all layers would empty these first: {names} of all weights pruned. "
        f"fxpath.prune(..., {'gates=True, ' * gated}max_layer_sparsity=0.95) leaves a part of each."
    )
    return Finding(
        "emptied", text, tuple(name for _, name in found), tuple(part for part, _ in found)
    )


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:] + "."


def _named(items: Sequence[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(part: float) -> str:
    return f"{part:.2g}" if 0 < part < 1e-6 else f"{part:.2%}"
