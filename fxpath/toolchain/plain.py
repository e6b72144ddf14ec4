"""Plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """Plain data with null for what JSON has no literal for (NaN, infinities).

    Example:
        >>> finite({"path_norm": float("inf"), "shape": (3, 4)})
        {'path_norm': None, 'shape': [3, 4]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
