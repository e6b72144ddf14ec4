"""How an opaque operator is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fxpath", "FRAGMENT")

Kernel = Callable[..., Any]

#: What each operator runs.
KERNELS: dict[torch._ops.OpOverload, Kernel] = {}


def operator(schema: str, fake: Kernel) -> Callable[[Kernel], Kernel]:
    """Define ``torch.ops.fxpath.<name>``; ``fake`` says what comes out, without computing it.

    An operator must return neither one of its arguments nor the same tensor twice.
    """
    name = schema.split("(")[0]

    def define(kernel: Kernel) -> Kernel:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxpath::{name}", fake, lib=_LIBRARY)
        KERNELS[getattr(torch.ops.fxpath, name).default] = kernel
        return kernel

    return define


def host(value: float | list[float]) -> Tensor:
    """Numbers as a float64 tensor on the CPU."""
    return torch.tensor(value, dtype=torch.float64)


def scalar() -> Tensor:
    """The form of one such number."""
    return torch.empty((), dtype=torch.float64)
