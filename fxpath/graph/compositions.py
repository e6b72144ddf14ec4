"""The table of operators that users have said the composition of: exact overload -> function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxpath.private import OpOverload

#: Filled and emptied by :func:`fxpath.register_rule`, read by every capture.
COMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}
