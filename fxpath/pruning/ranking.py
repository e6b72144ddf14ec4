"""In which order units go, and how many of them: amounts, multiples, lower limits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxpath.pruning.channels import Channels, Kept
from fxpath.pruning.units import Unit
from fxpath.symmetry.labels import Forest

_WHOLE = Kept("all channels of a layer go together, and none would be left")


class Ranking:
    """Units in the order in which they go.

    Attributes:
        units: those that can go, the least important first.
        removable: how many output channels of layers the units have, also those that stay because a
            layer keeps some.
        kept: channels of units without which a layer would have none.
    """

    def __init__(
        self, found: Channels, units: Sequence[Unit], multiple_of: int, min_channels: int
    ) -> None:
        self._multiple_of = multiple_of
        self._sizes = {name: len(channels) for name, channels in found.outputs.items()}
        lines = [(name, channels, min_channels) for name, channels in found.outputs.items()]
        for number, axis in enumerate(found.axes):
            line = axis.channels if axis.channels.dim() == 1 else axis.channels[0]
            lines.append((f"{number}:", line, 1))
        unit_of = torch.full((found.count + 1,), -1)
        for number, unit in enumerate(units):
            unit_of[list(unit.channels)] = number
        #: For each unit the layers that lose channels with it, and how many.
        self._losses: list[dict[str, int]] = [{} for _ in units]
        sizes: dict[str, int] = {}
        spare: dict[str, int] = {}
        for name, line, least in lines:
            numbers = unit_of[line]
            sizes[name], spare[name] = len(line), len(line) - least
            for number, count in zip(
                *numbers[numbers >= 0].unique(return_counts=True), strict=True
            ):
                self._losses[int(number)][name] = int(count)
        self.units: list[Unit] = []
        self.kept: dict[int, Kept] = {}
        self.removable = 0
        losses = []
        for unit, lost in zip(units, self._losses, strict=True):
            self.removable += sum(n for name, n in lost.items() if name in self._sizes)
            if any(spare[name] < count for name, count in lost.items()):
                # That min_channels keeps some is no news; that a layer can lose none is.
                if any(sizes[name] == count for name, count in lost.items() if sizes[name] > 1):
                    self.kept.update(dict.fromkeys(unit.channels, _WHOLE))
                continue
            for name, count in lost.items():
                spare[name] -= count
            self.units.append(unit)
            losses.append({name: count for name, count in lost.items() if name in self._sizes})
        self._losses = losses
        self._families = self._find_families()

    def _find_families(self) -> list[int]:
        """For each unit the number of its family: units that share a layer."""
        forest = Forest()
        forest.fresh(len(self.units))
        first: dict[str, int] = {}
        for number, lost in enumerate(self._losses, 1):
            for name in lost:
                other = first.setdefault(name, number)
                forest.unite(torch.tensor([other]), torch.tensor([number]))
        return [forest.find(number) for number in range(1, len(self.units) + 1)]

    def first(self, count: int) -> list[int]:
        """Channels that go when ``count`` units may: each layer keeps a multiple of what was asked.

        The larger ``count``, the more go.
        """
        if self._multiple_of == 1:
            taken = list(range(count))
        else:
            families: dict[int, list[int]] = {}
            for number in range(count):
                families.setdefault(self._families[number], []).append(number)
            taken = [number for each in families.values() for number in self._rounded(each)]
        return [channel for number in taken for channel in self.units[number].channels]

    def _rounded(self, numbers: Sequence[int]) -> Sequence[int]:
        """The longest beginning that leaves multiples in all layers that lose channels."""
        lost: dict[str, int] = {}
        best = 0
        for position, number in enumerate(numbers, 1):
            for name, count in self._losses[number].items():
                lost[name] = lost.get(name, 0) + count
            if all((self._sizes[n] - gone) % self._multiple_of == 0 for n, gone in lost.items()):
                best = position
        return numbers[:best]

    def within(self, amount: float | int) -> int:
        """How many units an amount of the removable output channels allows."""
        allowed = round(amount * self.removable) if isinstance(amount, float) else amount
        count = 0
        for lost in self._losses:
            allowed -= sum(lost.values())
            if allowed < 0:
                break
            count += 1
        return count
