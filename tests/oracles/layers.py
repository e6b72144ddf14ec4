"""Layers of a declarative network, and the `nn.Module` of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layer:
    """One operation: its name, the tensors it reads (by number), and its options.

    ============ ==================================================================================
    ``linear``   ``out, bias``; on the last axis
    ``conv``     ``out, kernel, stride, padding, dilation, groups, bias``; one or two spatial axes
    ``batchnorm``  ``affine``; over the first axis
    ``relu``     no options
    ``maxpool``  ``kernel, stride, padding, dilation, ceil``
    ``avgpool``  ``kernel, stride, padding, ceil, include_pad``
    ``flatten``  no options
    ``add``, ``sub``, ``maximum``  two tensors of one shape
    ``cat``      any number of tensors, along the first axis
    ============ ==================================================================================

    ``use=j`` in the options of a layer with parameters takes the module of layer j again.
    """

    op: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def module_of(layer: Layer, shape: Sequence[int]) -> nn.Module | None:
    """The module of a layer that reads a tensor of this shape (no batch axis), if it has one."""
    options = dict(layer.options)
    if "use" in options:
        return None
    rank = len(shape) - 1
    if layer.op == "linear":
        return nn.Linear(shape[-1], options["out"], bias=options["bias"])
    if layer.op == "conv":
        convolution = (nn.Conv1d, nn.Conv2d)[rank - 1]
        return convolution(
            shape[0],
            options["out"],
            options["kernel"],
            stride=options.get("stride", 1),
            padding=options.get("padding", 0),
            dilation=options.get("dilation", 1),
            groups=options.get("groups", 1),
            bias=options["bias"],
        )
    if layer.op == "batchnorm":
        normalization = nn.BatchNorm2d if rank == 2 else nn.BatchNorm1d
        return normalization(shape[0], affine=options.get("affine", True))
    if layer.op == "relu":
        return nn.ReLU()
    if layer.op == "maxpool":
        pooling = (nn.MaxPool1d, nn.MaxPool2d)[rank - 1]
        return pooling(
            options["kernel"],
            stride=options.get("stride", 1),
            padding=options.get("padding", 0),
            dilation=options.get("dilation", 1),
            ceil_mode=options.get("ceil", False),
        )
    if layer.op == "avgpool":
        averaging = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1]
        return averaging(
            options["kernel"],
            stride=options.get("stride", 1),
            padding=options.get("padding", 0),
            ceil_mode=options.get("ceil", False),
            count_include_pad=options.get("include_pad", True),
        )
    return None
