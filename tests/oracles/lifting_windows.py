"""The rules of the float64 oracle for windows: pooling, interpolation and padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.lifted import Lifted, Lifting, UnknownOperation, along, power


def max_pool(dimensions: int) -> Callable[..., Tensor]:
    def max_pool(
        lifting: Lifting,
        input: Lifted,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if return_indices:
            raise UnknownOperation("max pooling that returns indices")
        value = lifting.read(input)
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = zip(
            *(_each(x, dimensions) for x in (kernel_size, stride, padding, dilation)), strict=True
        )
        for axis, (k, s, p, d) in enumerate(geometry, start=value.dim() - dimensions):
            starts = _window_starts(value.shape[axis], k, s, p, d, ceil_mode)
            windows = [[i for i in range(o, o + k * d, d)] for o in starts]
            value = _sum_windows(value, axis, windows)
        return value

    return max_pool


def avg_pool(dimensions: int) -> Callable[..., Tensor]:
    def avg_pool(
        lifting: Lifting,
        input: Lifted,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        value = lifting.read(input)
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = zip(*(_each(x, dimensions) for x in (kernel_size, stride, padding)), strict=True)
        divisor = torch.ones((), dtype=torch.float64)
        for axis, (k, s, p) in enumerate(geometry, start=value.dim() - dimensions):
            size = value.shape[axis]
            starts = _window_starts(size, k, s, p, 1, ceil_mode)
            value = _sum_windows(value, axis, [list(range(o, o + k)) for o in starts])
            first, end = (-p, size + p) if count_include_pad else (0, size)
            counts = [float(min(o + k, end) - max(o, first)) for o in starts]
            divisor = divisor[..., None] * torch.tensor(counts, dtype=torch.float64)
        if divisor_override is not None:
            divisor = torch.tensor(float(divisor_override), dtype=torch.float64)
        return value / power(divisor, lifting.q)

    return avg_pool


def adaptive_pool(dimensions: int, average: bool) -> Callable[..., Tensor]:
    def adaptive_pool(
        lifting: Lifting, input: Lifted, output_size: Any, return_indices: bool = False
    ) -> Tensor:
        if return_indices:
            raise UnknownOperation("max pooling that returns indices")
        value = lifting.read(input)
        sizes = _each(output_size, dimensions)
        for axis, size in enumerate(sizes, start=value.dim() - dimensions):
            length = value.shape[axis]
            size = length if size is None else size
            windows = [
                list(range(o * length // size, -(-(o + 1) * length // size))) for o in range(size)
            ]
            value = _sum_windows(value, axis, windows)
            if average:
                counts = torch.tensor([float(len(w)) for w in windows], dtype=torch.float64)
                value = value / along(power(counts, lifting.q), axis, value.dim())
        return value

    return adaptive_pool


def interpolate(
    lifting: Lifting,
    input: Lifted,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    value = lifting.read(input)
    dimensions = value.dim() - 2
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear") or antialias:
        raise UnknownOperation(f"interpolation with mode {mode!r}, antialias={antialias}")
    sizes, scales = _each(size, dimensions), _each(scale_factor, dimensions)
    for axis, (length, scale) in enumerate(zip(sizes, scales, strict=True), start=2):
        # The matrix of the map along one axis: what it does to the unit vectors. Taps that hit one
        # source position are added in it, so the power comes after.
        unit_vectors = torch.eye(value.shape[axis], dtype=torch.float64)[None]
        matrix = F.interpolate(
            unit_vectors,
            size=length,
            scale_factor=scale,
            mode="linear" if mode.endswith("linear") else mode,
            align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor,
        )[0]
        value = (value.movedim(axis, -1) @ power(matrix, lifting.q)).movedim(-1, axis)
    return value


def pad(
    lifting: Lifting, input: Lifted, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant":
        return F.pad(lifting.read(input), pad, mode=mode)
    if not math.isfinite(value or 0):
        raise UnknownOperation("padding with an infinite value")
    return F.pad(lifting.read(input), pad, value=power(value or 0, lifting.q))


def _each(x: Any, dimensions: int) -> list[Any]:
    """Expand PyTorch's "an int or one per dimension"."""
    if isinstance(x, (tuple, list)):
        return list(x) * (dimensions if len(x) == 1 else 1)
    return [x] * dimensions


def _window_starts(size: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> list[int]:
    """First position of each pooling window, negative in the padding."""
    room = size + 2 * p - d * (k - 1) - 1  # how far a window can move in the padded axis
    count = (-(-room // s) if ceil_mode else room // s) + 1
    starts = [o * s - p for o in range(count)]
    # ceil_mode adds a window that sticks out, unless it starts in the padding at the end.
    return [start for start in starts if start < size or not ceil_mode]


def _sum_windows(value: Tensor, axis: int, windows: list[list[int]]) -> Tensor:
    """Sum over windows of positions along one axis; positions outside the tensor count nothing."""
    size = value.shape[axis]
    return torch.stack(
        [value[_at(axis, [i for i in w if 0 <= i < size])].sum(axis) for w in windows], dim=axis
    )


def _at(axis: int, positions: list[int]) -> tuple[Any, ...]:
    """Index the given positions of one axis."""
    return (*[slice(None)] * axis, positions)
