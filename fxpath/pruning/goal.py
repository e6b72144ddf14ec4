"""How much is to be cut, and the masks that cut it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from torch import Tensor

from fxpath.pruning.budget import last_that, most_within
from fxpath.pruning.patterns import NM, kept_by_pattern
from fxpath.pruning.selection import count_of, cut, cut_capped

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Goal:
    """What was asked for; see :func:`fxpath.prune`."""

    amount: float | None
    budget: float | None
    pattern: NM | None
    scope: str
    cap: float | None
    steps: int

    def check(self) -> None:
        """Refuse what is out of range, or does not go together.

        Raises:
            TypeError: for what is no number or no pattern, saying which argument.
            ValueError: saying which argument.
        """
        numbers: dict[str, object] = {"budget": self.budget, "max_layer_sparsity": self.cap}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise TypeError(f"{name}={value!r}: a number")
        given = [self.amount, self.budget, self.pattern]
        if sum(value is not None for value in given) != 1:
            raise ValueError("pass exactly one of amount, budget and pattern")
        if self.scope not in ("global", "layer"):
            raise ValueError(f'scope={self.scope!r}: "global" or "layer"')
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r}: a number of steps, at least 1")
        if self.cap is not None and not 0 <= self.cap < 1:
            raise ValueError(f"max_layer_sparsity={self.cap}: a share, at least 0 and below 1")
        if self.budget is not None and not self.budget >= 0:
            raise ValueError(f"budget={self.budget}: a part of the path-norm, at least 0")
        if self.budget is not None and self.scope == "layer":
            raise ValueError('budget ranks the entries of all layers together: scope="global"')
        if self.pattern is not None:
            if not isinstance(self.pattern, NM):
                raise TypeError(f"pattern={self.pattern!r}: pass an fxpath.NM")
            if self.scope == "layer" or self.cap is not None or self.steps > 1:
                raise ValueError(
                    "a pattern fixes how much goes, in every layer: scope, max_layer_sparsity and "
                    "steps do not go with it"
                )

    def share_of(self, entries: int) -> float | None:
        """The share of a parameter's entries that is asked for, where each has its own."""
        if self.pattern is not None:
            return 1 - self.pattern.keep / self.pattern.of
        if self.scope == "layer" and self.amount is not None:
            return count_of(self.amount, entries) / max(1, entries)
        return None

    def cap_of(self, entries: int) -> int:
        """How many of a parameter's entries may go."""
        if self.cap is None:
            return entries
        # Rounded up, so that a cap that is the amount leaves room for it.
        # As a decimal, as it was written: 0.07 of 100 are 7, and not 7.000000000000001.
        return max(0, min(math.ceil(Fraction(str(self.cap)) * entries), entries - 1))


def decided(
    goal: Goal,
    step: int,
    scores: Mapping[str, Tensor],
    inputs: Mapping[str, int | None],
    lost: Callable[[Masks], float],
    estimated: Callable[[Masks], float],
) -> Masks:
    """Masks that go a part of the way.

    Args:
        goal: of all steps.
        step: of ``goal.steps``, from 1.
        scores: of all entries that may go.
        inputs: axis of each parameter's input channels.
        lost: the relative path-metric to the dense network that masks cost.
        estimated: the same up to rounding, to look for where a budget ends.

    Raises:
        ValueError: if there are not as many entries as asked for.
    """
    part = step / goal.steps
    if goal.pattern is not None:
        axes = {name: axis for name, axis in inputs.items() if axis is not None}
        return {n: kept_by_pattern(s, axes[n], goal.pattern) for n, s in scores.items()}
    caps = {name: goal.cap_of(score.numel()) for name, score in scores.items()}
    if goal.scope == "layer":
        assert goal.amount is not None
        masks: Masks = {}
        for name, score in scores.items():
            count = round(count_of(goal.amount, score.numel()) * part)
            masks |= _lowest({name: score}, count, caps)
        return masks
    if goal.budget is not None:
        budget, room = goal.budget * part, sum(caps.values())
        guess = most_within(budget, room, lambda n: estimated(_lowest(scores, n, caps)))
        count = last_that(lambda n: lost(_lowest(scores, n, caps)) <= budget, room, guess)
    else:
        assert goal.amount is not None
        count = round(count_of(goal.amount, sum(s.numel() for s in scores.values())) * part)
    return _lowest(scores, count, caps)


def _lowest(scores: Mapping[str, Tensor], count: int, caps: Mapping[str, int]) -> Masks:
    if all(caps[name] == score.numel() for name, score in scores.items()):
        common = cut(scores, count)
        return {name: common.kept(name, score) for name, score in scores.items()}
    cuts = cut_capped(scores, count, caps)
    return {name: cuts[name].kept(name, score) for name, score in scores.items()}
