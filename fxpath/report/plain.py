"""Plain data as JSON, and text as files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


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


def ending(text: str, width: int, keep_start: bool = False) -> str:
    """Cut a text to ``width``, at its end if ``keep_start``, else at its start.

    Example:
        >>> ending("layer4.0.downsample.0", 12), ending("layer4", 12)
        ('…ownsample.0', 'layer4')
    """
    if len(text) <= width:
        return text
    return text[: width - 1] + "…" if keep_start else "…" + text[1 - width :]


def by_module(rows: Iterable[T], name: Callable[[T], str], depth: int | None) -> dict[str, list[T]]:
    """Rows by the module that they are in, down to a depth of dotted names; ``None``: to the end.

    Raises:
        ValueError: if ``depth`` is below 1.
    """
    if depth is not None and not (isinstance(depth, int) and depth >= 1):
        raise ValueError(f"depth={depth}: pass 1 for the outermost modules, 2 for theirs, ...")
    found: dict[str, list[T]] = {}
    for row in rows:
        found.setdefault(".".join(name(row).split(".")[:depth]), []).append(row)
    return found
