"""A neutral state of torch, whatever the caller has switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fxpath.private import compile_lock

__all__ = ["TRACING", "plain_mode"]

#: Held while torch traces or compiles: neither is safe in two threads at once, and what a model's
#: own code did to the caller's containers meanwhile is undone behind it.  It is the one that Dynamo
#: holds: with two, fxpath called by Dynamo and Dynamo called by fxpath would wait for each other.
TRACING = compile_lock


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """No inference mode, autocast or meta device: gradients, number formats and values exist."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).is_meta:
            # A device without values is what a model is built on, not what it is evaluated on.
            stack.enter_context(torch.device("cpu"))
        yield
