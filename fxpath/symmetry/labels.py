"""Labels of channels: the values that :mod:`fxpath.symmetry.labelling` computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

#: The label of input and output neurons, whose scale is given.
FIXED = 0


@dataclass(frozen=True)
class Labels:
    """Labels of an activation; ``ids`` has length 1 along axes on which they do not depend."""

    ids: Tensor
    shape: tuple[int, ...]


@dataclass(eq=False)
class Norm:
    """Gamma / sigma of a frozen batch norm, and the labels on its two sides, ``[channels]``."""

    gamma: str | None
    var: str | None
    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Coordinates:
    """Entries of theta where an operation reads them.

    Attributes:
        name: of the coordinates.
        node: of the lifted graph that they are; ``None`` before they have a name.
        own: the tensor of the model that holds them, ``None`` if they are computed.
        norm: the batch norm that is folded into them, or that they are.
        beta: the tensor that is added after that norm.
        mean: the tensor that is subtracted before it.
        computed: whether one of them is computed from parameters, so that it holds no factor.
        shape: of the tensor.
        views: operations between the tensor and the reader.
    """

    name: str
    own: str | None
    shape: tuple[int, ...]
    norm: Norm | None = None
    beta: str | None = None
    mean: str | None = None
    computed: bool = False
    views: tuple[Callable[[Tensor], Tensor], ...] = ()
    node: fx.Node | None = None

    def seen(self) -> Tensor:
        """Number of the stored entry at each entry as it is read, float64."""
        numbers = torch.arange(torch.Size(self.shape).numel()).double().reshape(self.shape)
        for view in self.views:
            numbers = view(numbers)
        return numbers

    def stored(self, labels: Tensor) -> Tensor:
        """Labels of the stored entries, from those of the entries as they are read; -1 unread."""
        if not self.views:
            return labels
        seen = self.seen()
        flat = torch.full((torch.Size(self.shape).numel(),), -1)
        flat[seen.long().reshape(-1)] = labels.expand(seen.shape).reshape(-1)
        return flat.reshape(self.shape)


@dataclass
class Carried:
    """How a tensor of the model is rescaled: by the factor of ``out`` over that of ``into``.

    Label tensors broadcast to the tensor's shape; -1 marks entries that nothing reads, ``None``
    stands for a factor of 1.  ``axes`` are the axes of ``out`` and ``into`` in the tensor.
    """

    shape: tuple[int, ...]
    out: Tensor | None
    into: Tensor | None
    axes: tuple[int, int]


class Forest:
    """Sets of labels (union-find)."""

    def __init__(self) -> None:
        self.parent = [FIXED]

    def fresh(self, count: int) -> Tensor:
        """New labels, ``[count]``."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, label: int) -> int:
        """The smallest label of a set."""
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Make labels equal, entry by entry, with broadcasting; -1 stands for none."""
        pairs = torch.stack(torch.broadcast_tensors(a, b)).reshape(2, -1)
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs >= 0).all(0)]
        for left, right in torch.unique(pairs, dim=1).T.tolist():
            low, high = sorted((self.find(left), self.find(right)))
            self.parent[high] = low

    def roots(self) -> Tensor:
        """The smallest label of each label's set, ``[labels]``."""
        return torch.tensor([self.find(label) for label in range(len(self.parent))])


def compressed(ids: Tensor) -> Tensor:
    """One position of each axis on which labels do not depend."""
    for axis in range(ids.dim()):
        first = ids.narrow(axis, 0, min(1, ids.shape[axis]))
        if bool((ids == first).all()):
            ids = first
    return ids
