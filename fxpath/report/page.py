"""An analysis as one page for a browser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def page(report: Mapping[str, Any]) -> str:
    """One self-contained document."""
    raise NotImplementedError(report)
