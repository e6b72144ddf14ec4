"""How far a ranking can be followed before more than a budget is lost."""

from __future__ import annotations

from collections.abc import Callable


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


def last_that(holds: Callable[[int], bool], count: int, guess: int | None = None) -> int:
    """The largest number up to ``count`` for which something holds, which does for 0 and ends once.

    Bisection; where a good guess is known, two questions are enough.

    Example:
        >>> last_that(lambda n: n * n <= 10, 100), last_that(lambda n: n * n <= 10, 100, guess=3)
        (3, 3)
    """
    low, high = 0, count
    if guess is not None and 0 < guess:
        step = 1
        if holds(guess):
            low = guess
            while low < high and holds(min(high, low + step)):
                low, step = min(high, low + step), 2 * step
            high = min(high, low + step - 1)
        else:
            high = guess - 1
            while low < high and not holds(max(low, high - step)):
                high, step = max(low, high - step) - 1, 2 * step
            low = max(low, high - step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
