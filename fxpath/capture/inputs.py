"""Which inputs a model is traced with: one sample of what the caller gives.

The rule.  ``batch_dim`` is the batch axis of every input tensor, wherever it stands: positional,
by keyword, inside dicts, lists, tuples and dataclasses that torch's pytrees know.  A shape is given
without that axis, and gets one of length 1.  Of given tensors the first sample counts: all that
have the axis must agree in its length, up to those of length 1, which are the same for all samples.
``batch_dim=None`` says that there is no such axis: shapes and tensors are taken as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from fxpath.model.captured import Shape
from fxpath.model.given import Given
from fxpath.private import keystr, tree_flatten_with_path, tree_map_only

Call = tuple[tuple[Any, ...], dict[str, Any]]


def from_shapes(model: nn.Module, given: Given) -> Call:
    """Zeros in the given shapes, in the number format and on the device of the model.

    Raises:
        ValueError: for a length that is no positive integer, or a ``batch_dim`` out of range.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))

    def zeros(shape: Shape) -> Tensor:
        full = list(_checked(shape))
        if given.batch_dim is not None:
            full.insert(_axis(given.batch_dim, len(full) + 1), 1)
        dtype = like.dtype if like.dtype.itemsize > 1 else torch.float32
        return torch.zeros(full, dtype=dtype, device=like.device)

    shapes: Any = given.input_shape
    if isinstance(shapes, Mapping):
        return (), {name: zeros(shape) for name, shape in shapes.items()}
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise ValueError(f"input_shape={shapes!r}: pass a tuple of lengths, such as (3, 224, 224)")
    several = bool(shapes) and isinstance(shapes[0], Sequence)
    return tuple(zeros(shape) for shape in (shapes if several else [shapes])), {}


def _checked(shape: Any) -> tuple[int, ...]:
    lengths: list[int] = []
    for n in shape if isinstance(shape, Sequence) else [None]:
        # Whatever counts as an integer, numpy's among them.
        lengths.append(operator.index(n) if isinstance(n, SupportsIndex) else 0)
    if any(n <= 0 for n in lengths):
        raise ValueError(f"input_shape {shape}: every length must be a positive integer")
    return tuple(lengths)


def from_values(given: Given) -> Call:
    """The inputs that the caller has, as they are.

    Raises:
        ValueError: for inputs that are no sequence, or shapes beside them.
    """
    if given.input_shape is not None:
        raise ValueError(
            "pass shapes (input_shape) or tensors (example_inputs and example_kwargs), not both"
        )
    inputs: Any = given.example_inputs
    if isinstance(inputs, Mapping):
        raise ValueError(
            "example_inputs is a dict: pass keyword inputs as example_kwargs={...}, and a single "
            "input that is a dict as example_inputs=({...},)"
        )
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if inputs is not None and not isinstance(inputs, tuple | list):
        raise ValueError(
            f"example_inputs is a {type(inputs).__name__}: pass a tensor, or a tuple of all inputs"
        )
    return tuple(inputs or ()), dict(given.example_kwargs or {})


def batch_size(call: Call, batch_dim: int | None) -> int:
    """How many samples the inputs hold; 1 if there is no batch axis.

    Raises:
        ValueError: if the inputs disagree, or one has too few axes.
    """
    if batch_dim is None:
        return 1
    lengths: dict[str, int] = {}
    for path, leaf in tree_flatten_with_path(call)[0]:
        if isinstance(leaf, Tensor) and leaf.dim():
            # The first key says whether it is positional, the second which one.
            lengths[_name(path)] = leaf.shape[_axis(batch_dim, leaf.dim())]
    sizes = set(lengths.values()) - {1}
    if len(sizes) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise ValueError(
            f"the inputs differ in their length along the batch axis {batch_dim} ({found}), so "
            "that no single sample can be taken; pass the inputs of one sample, with "
            "batch_dim=None if they have no batch axis"
        )
    return sizes.pop() if sizes else 1


def _name(path: Any) -> str:
    inner = keystr(path[1:])
    return f"example_inputs{inner}" if path[0].idx == 0 else f"example_kwargs{inner}"


def _axis(batch_dim: int, axes: int) -> int:
    if not -axes <= batch_dim < axes:
        raise ValueError(
            f"batch_dim={batch_dim}: an input has {axes} axes, its batch axis included"
        )
    return batch_dim % axes


def first_sample(call: Call, batch_dim: int | None) -> Call:
    """The first sample of all inputs."""
    if batch_dim is None:
        return call

    def cut(x: Tensor) -> Tensor:
        return x.narrow(_axis(batch_dim, x.dim()), 0, 1) if x.dim() else x

    cut_call: Call = tree_map_only(Tensor, cut, call)
    return cut_call
