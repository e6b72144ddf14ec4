"""The modules of a network as a tree, from the dotted names of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A module with more parts than this is shown in runs, which open one at a time.
_CROWD = 40
_RUN = 20


@dataclass(frozen=True)
class Module:
    """A layer, or a module (or a run of its parts) with what is in it.

    Attributes:
        name: as shown, without the names of the modules around it.
        layers: indices of the layers in it, in order of execution.
        parts: the modules in it; none for a layer.
    """

    name: str
    layers: tuple[int, ...]
    parts: tuple[Module, ...] = ()


def nest(names: Sequence[str]) -> tuple[Module, ...]:
    """Modules by the dots in the names of their layers, in order of execution.

    A module of one part is written as one with it.

    Args:
        names: of the layers, in order of execution.

    Example:
        >>> [(m.name, m.layers) for m in nest(["stem", "block.0.conv", "block.1", "head.fc"])]
        [('stem', (0,)), ('block', (1, 2)), ('head.fc', (3,))]
    """
    return _runs(_parts([(tuple(name.split(".")), i) for i, name in enumerate(names)]))


def walk(parts: Sequence[Module], depth: int = 1) -> Iterator[tuple[int, Module]]:
    """Every module with its depth, the outer ones at 1."""
    for part in parts:
        yield depth, part
        yield from walk(part.parts, depth + 1)


def sums(
    layers: Sequence[Mapping[str, Any]], weights: Sequence[tuple[int, float]]
) -> dict[str, float]:
    """Numbers of a module from those of its layers.

    Args:
        layers: rows with ``share``, ``parameters`` and ``effective``.
        weights: of each, how many entries it has and the sum of their scores.

    Returns:
        ``parameters``, their number; ``share``, the mean over the layers: the part of them that a
        path crosses on average, paths weighted by their mass; ``effective_part``, the effective
        number of all entries together, as a part of them.  With T the sum of a layer's scores and
        H the entropy of their parts of T, ``sum -s log s = T (H - log T)`` over its entries, and
        such sums add up.
    """
    entries, total = sum(n for n, _ in weights), sum(mass for _, mass in weights)
    entropic = sum(
        mass * (math.log(row["effective"]) - math.log(mass))
        for row, (_, mass) in zip(layers, weights, strict=True)
        if mass > 0
    )
    effective = math.exp(math.log(total) + entropic / total) if total > 0 else 0.0
    return {
        "parameters": sum(row["parameters"] for row in layers),
        "share": sum(row["share"] for row in layers) / len(layers),
        "effective_part": effective / max(1, entries),
    }


def _parts(layers: list[tuple[tuple[str, ...], int]]) -> list[Module]:
    groups: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for (head, *rest), index in layers:
        groups.setdefault(head, []).append((tuple(rest), index))
    return [part for name, inner in groups.items() for part in _module(name, inner)]


def _module(name: str, inner: list[tuple[tuple[str, ...], int]]) -> Iterator[Module]:
    # A module may read parameters of its own beside those of its modules.
    own = [Module(name, (index,)) for rest, index in inner if not rest]
    parts = _parts([(rest, index) for rest, index in inner if rest])
    if len(parts) == 1:
        yield from own
        yield Module(f"{name}.{parts[0].name}", parts[0].layers, parts[0].parts)
    elif parts:
        yield from own
        layers = tuple(index for rest, index in inner if rest)
        yield Module(name, layers, _runs(parts))
    else:
        yield from own


def _runs(parts: list[Module]) -> tuple[Module, ...]:
    """The parts themselves, or runs of them where they are a crowd."""
    if len(parts) <= _CROWD:
        return tuple(parts)
    runs = [parts[i : i + _RUN] for i in range(0, len(parts), _RUN)]
    return tuple(
        Module(f"{run[0].name} … {run[-1].name}", sum((p.layers for p in run), ()), tuple(run))
        for run in runs
    )
