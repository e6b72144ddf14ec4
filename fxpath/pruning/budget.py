"""How far a ranking can be followed before more than a budget is lost."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["most_within"]


def most_within(budget: float, entries: int, lost: Callable[[int], float]) -> int:
    """The largest count whose loss is within a budget; one more would exceed it.

    The loss grows with the count.  Between two counts that are known it is taken to be a straight
    line, and the end that stays put counts half as much the next time (the Illinois rule); each
    third guess halves the interval, so that no shape of the loss makes it slow.

    Args:
        budget: the largest loss.
        entries: the largest count.
        lost: the loss of a count; that of 0 is 0.

    Example:
        >>> most_within(50.0, 1000, lambda count: count**2 / 10)
        22
    """
    low, high = 0, entries
    below, above = budget, lost(entries) - budget
    if above <= 0:
        return entries
    turn, last = 0, 0
    while high - low > 1:
        turn += 1
        guess = (low + high) // 2
        if turn % 3 and below > 0:
            guess = low + round((high - low) * below / (below + above))
        count = min(max(guess, low + 1), high - 1)
        excess = lost(count) - budget
        if excess <= 0:
            low, below = count, -excess
            above = above / 2 if last < 0 else above
            last = -1
        else:
            high, above = count, excess
            below = below / 2 if last > 0 else below
            last = 1
    return low
