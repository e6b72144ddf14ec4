"""Derived graphs through ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxpath.modes import TRACING
from fxpath.private import has_cpp_compiler

#: fxpath itself, as a backend of ``torch.compile``.
ANALYSIS = "fxpath"


def check_backend(backend: str) -> None:
    """Refuse what is no name of a backend.

    Raises:
        ValueError: with the names that there are.
    """
    known = ["eager", "inductor", *torch.compiler.list_backends(None)]
    if backend == ANALYSIS:
        raise ValueError(
            f"backend={backend!r} analyses what it compiles, and the graph of a path-norm is no "
            "network: pass the backend that is to run it"
        )
    if backend not in known:
        raise ValueError(f"backend={backend!r}: known are {', '.join(dict.fromkeys(known))}")


def compiled(module: fx.GraphModule, backend: str) -> Callable[..., Any]:
    """Compile a derived graph that writes into given memory; nothing happens before its first call.

    It is taken apart into ATen operations first, which is faster than to have Dynamo read the
    Python of each step.  New values of tensors are no reason to compile again, new forms are.
    """
    known: dict[Any, Callable[..., Any]] = {}

    def call(*tensors: Tensor) -> Any:
        form = tuple((t.dtype, t.shape, t.stride(), t.device) for t in tensors)
        if form in known:
            return known[form](*tensors)
        with TRACING:  # other threads wait for the first call, which compiles
            if form not in known:
                traced = make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
                # A graph, and so a function, for each form: Dynamo gives up on one with many.
                runs = torch.compile(traced, fullgraph=True, dynamic=False, backend=backend)
                found = runs(*tensors)
                known[form] = runs
                return found
        return known[form](*tensors)

    return call if backend != "inductor" or _can_generate() else module


def _can_generate() -> bool:
    """Whether Inductor finds a C++ compiler; one line says so if not."""
    if has_cpp_compiler():
        return True
    warnings.warn(
        "no C++ compiler found, so nothing is compiled and the graph runs as it is: "
        "install g++ or clang, or set CXX",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
