"""Shapes of results, found on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Forms", "form"]


def form(value: Any) -> Any:
    """A tensor's shape and dtype, as a meta tensor; anything else as it is."""
    if isinstance(value, Tensor):
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
    return value


class Forms:
    """What operations return for arguments of a given form; each is asked for once.

    A deep network repeats a few operations on a few shapes, and to try one takes longer than all
    else that a pass does with a node.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, str], Any] = {}

    def __call__(self, function: Callable[..., Any], args: Any) -> Any:
        """The form of ``function(*args)``, where nodes stand for what their ``meta`` says."""
        seen = fx.map_arg(args, lambda n: _Seen(n.meta["val"]))
        key = function, repr(seen)
        if key not in self._known:
            self._known[key] = form(function(*fx.map_arg(args, lambda n: n.meta["val"])))
        return self._known[key]


class _Seen:
    """How an argument looks."""

    def __init__(self, value: Tensor) -> None:
        self._text = f"<{value.dtype} {tuple(value.shape)}>"

    def __repr__(self) -> str:
        return self._text
