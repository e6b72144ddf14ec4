"""Plain data as JSON, and text as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
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


def json_text(value: Any) -> str:
    """Plain data as strict JSON with a line for each entry.

    Example:
        >>> json_text({"path_norm": float("inf")}).split()
        ['{', '"path_norm":', 'null', '}']
    """
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def written(text: str, path: str | Path | None) -> str:
    """The text; in a file as well, if there is a path."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
