"""How much is removed: amounts, budgets and constraints, as a caller gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping

Constraints = Mapping[str, float | int | str]


def check_amount(amount: float | int) -> None:
    """Refuse what is neither a share nor a count.

    Raises:
        TypeError: for something that is no number.
        ValueError: for a share outside of 0 ... 1, or a count below 0.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(f"amount={amount!r}: pass a share (float) or a count (int) of channels")
    if isinstance(amount, float) and not 0 <= amount <= 1:
        raise ValueError(f"amount={amount}: a share lies between 0 and 1; a count is an int")
    if amount < 0:
        raise ValueError(f"amount={amount}: a count is not negative")


def check_budget(budget: float) -> None:
    """Refuse what is no relative path-metric.

    Raises:
        TypeError: for something that is no number.
        ValueError: for a number that is negative, infinite or NaN.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget={budget!r}: pass a number, such as 0.01 for 1 % of the path-norm")
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget={budget}: the part of the path-norm that may be lost, >= 0")


def absolute(constraints: Constraints, before: Mapping[str, int]) -> dict[str, float]:
    """Constraints as numbers.

    Args:
        constraints: ``parameters`` or ``macs`` -> a number, or a string such as ``"60%"``.
        before: the model's own.

    Raises:
        TypeError: for a limit that is neither.
        ValueError: for an unknown key, no constraint at all, or a limit that is not positive.

    Example:
        >>> absolute({"parameters": "60%", "macs": 2e9}, {"parameters": 500, "macs": 10**10})
        {'parameters': 300.0, 'macs': 2000000000.0}
    """
    if not isinstance(constraints, Mapping):
        raise TypeError(f"constraints={constraints!r}: pass a dict")
    unknown = [repr(key) for key in constraints if key not in before]
    if unknown or not constraints:
        raise ValueError(
            f"constraints: {', '.join(unknown) or 'none'}; there are {', '.join(map(repr, before))}"
        )
    return {key: _limit(key, value, before[key]) for key, value in constraints.items()}


def _limit(key: str, value: float | int | str, before: int) -> float:
    number: float
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.removesuffix("%")) / 100 * before
        except ValueError:
            number = math.nan
        if not text.endswith("%"):
            number = math.nan
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"constraints[{key!r}]={value!r}: pass a number or a string such as '60%'")
    else:
        number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(
            f"constraints[{key!r}]={value!r}: pass a positive number, or a string such as '60%'"
        )
    return number


def unmet(limits: Mapping[str, float], sizes: Mapping[str, int]) -> list[str]:
    """Which limits are exceeded, in words."""
    return [
        f"{key} {sizes[key]:,} of at most {limit:,.10g}"
        for key, limit in limits.items()
        if sizes[key] > limit
    ]
