"""Which tensors take up the factors of channels, so that the function in training stays as well.

A batch norm in training divides by the statistics of the batch, so that a factor in the weights
before it is lost, while one in its own scale and bias is not.  Multiplied into these two it changes
nothing, neither in eval mode nor in training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments
from fxpath.model import Captured
from fxpath.symmetry.groups import ChannelGroups
from fxpath.symmetry.masses import coordinates

#: Tensor of the model -> groups that its entries are multiplied by, and divided by.
Numbers = Mapping[str, tuple[Tensor | None, Tensor | None]]


def through_norms(
    captured: Captured, lifted: fx.GraphModule, found: ChannelGroups
) -> tuple[Numbers, Tensor]:
    """Factors in the scale and bias of the batch norm behind a map, not in the map.

    Returns:
        Which groups scale each tensor; and which groups can have a factor, bool ``[groups]``.
        Those cannot whose scale a batch norm reads that is not folded into the map before it (in
        front of a ReLU, as in DenseNet), or one without parameters of its own.
    """
    moved: set[str] = set()
    scales: set[str] = set()
    shifts: set[str] = set()
    plain: set[str] = set()
    held: list[Tensor | None] = []

    def name(node: object) -> str:
        assert isinstance(node, fx.Node)
        return captured.tensors[str(node.target)]

    for node in coordinates(lifted):
        value = arguments(node)[0]
        out, into = found._entries.get(node, (None, None))
        if value.op == "placeholder":
            plain.add(name(value))
        elif value.target is ops.normalizer:
            held.append(into)
        elif value.target is ops.folded_weight:
            weight, factor = arguments(value)[:2]
            gamma = arguments(factor)[0]
            if gamma is None:
                held.append(out)
            else:
                moved.add(name(weight))
                scales.add(name(gamma))
        elif value.target is ops.folded_bias:
            bias, _, beta, mean = arguments(value)
            moved |= {name(each) for each in (bias, mean) if each is not None}
            shifts |= {name(beta)} if beta is not None else set()
    # What is read with and without a batch norm behind it, or as a part of one as well, would take
    # up the factor in one place only.
    tied = (moved | scales) & plain | moved & (scales | shifts)
    held += [found._numbers[each][0] for each in tied if each in found._numbers]
    numbers = dict(found._numbers)
    for each in moved & numbers.keys():
        numbers[each] = None, numbers[each][1]
    for each in scales & numbers.keys():
        numbers[each] = numbers[each][0], None
    free = torch.cat([found.rescalable, torch.zeros(1, dtype=torch.bool)])
    for labels in held:
        if labels is not None:
            free[labels] = False
    return numbers, free[:-1]
