"""What is asked of values in a captured graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fxpath.graph.refusal import READ_OUT, UNKNOWN_SHAPE, Refusal
from fxpath.graph.schema import bind
from fxpath.graph.stencil import Stencil

FORMATS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
}


def settled(value: Any) -> Any:
    """A tensor whose extents are numbers, also where they were counted during the export."""
    if not isinstance(value, Tensor) or all(isinstance(n, int) for n in value.shape):
        return value
    if any(not is_concrete_int(n) for n in value.shape):
        return value
    return value.new_empty([int(n) for n in value.shape], device="meta")


def check_shape(value: Any) -> None:
    """Refuse results whose extents depend on values."""
    if isinstance(value, Tensor) and not all(isinstance(n, int) for n in value.shape):
        raise Refusal(*UNKNOWN_SHAPE)


def real(value: Any) -> float:
    """A number of the forward code as a coefficient."""
    if isinstance(value, complex) or not math.isfinite(value):
        raise Refusal(f"it uses the number {value}", "use a finite real number")
    return float(value)


def is_sparse(held: Any) -> bool:
    """Whether a value is stored by its non-zero entries alone."""
    return isinstance(held, Tensor) and held.layout != torch.strided


def check_format(held: Any) -> None:
    """Refuse weights that are no plain real numbers."""
    if not isinstance(held, Tensor):
        raise Refusal(*READ_OUT)
    dtype = held.dtype
    if dtype not in FORMATS:
        raise Refusal(
            f"it reads a weight of dtype {dtype}, which is no plain number format",
            "convert the weights to float32 or float64",
        )


def as_slice(stencil: Stencil) -> tuple[int, int, int] | None:
    """Start, end and step, if the stencil picks positions at a constant step."""
    if not stencil.out or len(stencil.row) != stencil.out or not stencil.is_selection:
        return None
    picked = stencil.position
    start, end = int(picked[0]), int(picked[-1]) + 1
    step = int(picked[1]) - start if len(picked) > 1 else 1
    if step < 1 or end <= start or not torch.equal(picked, torch.arange(start, end, step)):
        return None
    return start, end, step


def is_float(value: fx.Node) -> bool:
    """Whether a value is an activation or weight rather than a list of positions."""
    tensor = value.meta.get("val")
    return isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())


def frozen(norm: fx.Node) -> bool:
    """Whether a batch norm uses its running statistics."""
    bound = bind(norm)
    if bound.get("training", False) or bound.get("use_input_stats", False):
        return False
    return isinstance(bound["running_mean"], fx.Node) and isinstance(bound["running_var"], fx.Node)
