"""Units: channels that have to be removed together, so that every shape stays valid.

Two rules make them.  Channels that lie on one position of one tensor are *tied*: those before and
after a depthwise convolution or a batch norm.  And a grouped convolution loses as many channels in
each of its groups: there a unit takes one channel from each, the least important that is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpath.pruning.channels import Channels, Kept
from fxpath.symmetry.labels import Forest

#: Why channel 0 stays, and what is tied to it.
ENDS = Kept(
    "they are channels of the model's inputs or outputs, or meet those: in a sum, a tensor, or an "
    "operation that is not followed, such as an einsum over two axes"
)


@dataclass(frozen=True)
class Unit:
    """Channels that go together.

    Attributes:
        channels: their numbers in :class:`Channels`.
        importance: the sum of theirs.
    """

    channels: tuple[int, ...]
    importance: float


def find_units(
    found: Channels, importance: Tensor, kept: Mapping[int, Kept]
) -> tuple[list[Unit], dict[int, Kept]]:
    """Units that can be removed, the least important first.

    Args:
        found: the channels.
        importance: of each channel, float64, ``[channels]``.
        kept: channels that stay, with the reason.

    Returns:
        The units, and all channels that stay.
    """
    bundles, reasons = _bundles(found, kept)
    balanced = _balances(found, bundles)
    units = [
        _unit(bundles[number], importance)
        for number in range(len(bundles))
        if number not in reasons and number not in balanced
    ]
    for component in _components(balanced):
        taken, left = _rows(component, balanced, bundles, reasons, importance)
        units += taken
        reasons.update(left)
    units.sort(key=lambda unit: (unit.importance, unit.channels))
    return units, {c: why for number, why in reasons.items() for c in bundles[number]}


def _unit(channels: Sequence[int], importance: Tensor) -> Unit:
    return Unit(tuple(sorted(channels)), float(importance[list(channels)].sum()))


def _bundles(found: Channels, kept: Mapping[int, Kept]) -> tuple[list[list[int]], dict[int, Kept]]:
    """Channels tied by position, and those bundles that stay."""
    forest = Forest()
    forest.fresh(found.count - 1)
    present: set[int] = set()
    by_place: dict[tuple[str, int], Tensor] = {}

    def tie(a: Tensor, b: Tensor) -> None:
        # What is tied to an input or an output stays; entries that nothing reads tie nothing.
        forest.unite(a.clamp(min=-1), b.clamp(min=-1))

    for axis in found.axes:
        present.update(axis.channels.unique().tolist())
        key = (axis.tensor, axis.axis)
        if key in by_place:
            tie(by_place[key], axis.channels)
        else:
            by_place[key] = axis.channels
    for group in (group for uses in found.grouped.values() for group in uses):
        if not group.balanced:
            whole = torch.cat([group.inputs, group.outputs], dim=1)
            tie(whole[:, :1], whole)
    members: dict[int, list[int]] = {}
    for channel in sorted(present):
        if channel > 0:
            members.setdefault(forest.find(channel), []).append(channel)
    bundles = list(members.values())
    reasons: dict[int, Kept] = {}
    for number, (root, channels) in enumerate(members.items()):
        whys = [kept[channel] for channel in channels if channel in kept]
        if root == 0:
            reasons[number] = ENDS
        elif whys:
            reasons[number] = whys[0]
    return bundles, reasons


#: For each grouped convolution, and each of its sides, how many positions a bundle has per group.
Signature = dict[int, tuple[int, ...]]


def _balances(found: Channels, bundles: Sequence[Sequence[int]]) -> dict[int, Signature]:
    """Bundles that a grouped convolution reads or makes: number -> signature."""
    bundle_of = torch.full((found.count + 1,), -1)
    for number, channels in enumerate(bundles):
        bundle_of[list(channels)] = number
    signatures: dict[int, Signature] = {}
    sides = [
        side
        for uses in found.grouped.values()
        for group in uses
        if group.balanced
        for side in (group.inputs, group.outputs)
    ]
    for index, side in enumerate(sides):
        numbers = bundle_of[side]
        counts: dict[int, list[int]] = {}
        for block, line in enumerate(numbers.tolist()):
            for number in line:
                if number >= 0:
                    counts.setdefault(number, [0] * len(numbers))[block] += 1
        for number, each in counts.items():
            signatures.setdefault(number, {})[index] = tuple(each)
    return signatures


def _components(signatures: Mapping[int, Signature]) -> list[list[int]]:
    """Bundles that share a grouped convolution's side, directly or through others."""
    seen: dict[int, list[int]] = {}
    for number, signature in signatures.items():
        for side in signature:
            seen.setdefault(side, []).append(number)
    left, components = set(signatures), []
    while left:
        pending, component = [min(left)], set[int]()
        while pending:
            number = pending.pop()
            if number not in component:
                component.add(number)
                for side in signatures[number]:
                    # Each side is walked once.
                    pending += seen.pop(side, [])
        left -= component
        components.append(sorted(component))
    return components


def _rows(
    component: Sequence[int],
    signatures: Mapping[int, Signature],
    bundles: Sequence[Sequence[int]],
    reasons: Mapping[int, Kept],
    importance: Tensor,
) -> tuple[list[Unit], dict[int, Kept]]:
    """Units of one bundle from each cell: bundles with one signature are a cell."""
    cells: dict[tuple[tuple[int, tuple[int, ...]], ...], list[int]] = {}
    units: list[Unit] = []
    for number in component:
        signature = signatures[number]
        if number in reasons and all(_even([each]) for each in signature.values()):
            continue
        if all(_even([each]) for each in signature.values()):
            units.append(_unit(bundles[number], importance))
            continue
        cells.setdefault(tuple(sorted(signature.items())), []).append(number)
    if not cells:
        return units, {}
    sides = {side for cell in cells for side, _ in cell}
    fits = all(_even([dict(cell)[side] for cell in cells if side in dict(cell)]) for side in sides)
    free = [[number for number in cell if number not in reasons] for cell in cells.values()]
    if not fits:
        why = Kept("grouped convolutions cut these channels into groups in different ways")
        return units, {number: why for cell in free for number in cell}
    ranked = [
        sorted(cell, key=lambda n: float(importance[list(bundles[n])].sum())) for cell in free
    ]
    count = min(map(len, ranked))
    for row in zip(*(cell[:count] for cell in ranked), strict=True):
        units.append(_unit([c for number in row for c in bundles[number]], importance))
    why = Kept("a grouped convolution keeps as many channels in each group")
    return units, {number: why for cell in ranked for number in cell[count:]}


def _even(signatures: Sequence[tuple[int, ...]]) -> bool:
    """Whether as many positions go in each group."""
    totals = [sum(each) for each in zip(*signatures, strict=True)]
    return len(set(totals)) == 1
