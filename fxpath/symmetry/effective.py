"""Which entries of theta share a scale, whatever holds them.

Models are rescaled by factors that their tensors take up (:mod:`fxpath.symmetry.labelling`).  A
score needs no tensor for a factor: here the effective parameters are rescaled themselves, so that a
pruned or parametrized weight, or one that a batch norm is folded into, is like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxpath.model import Captured
from fxpath.symmetry.labelling import Labelling
from fxpath.symmetry.labels import Coordinates, Labels, Norm


class EffectiveLabelling(Labelling):
    """The labelling in which each array of coordinates takes up its own factors.

    The rescalings of a model are among those that it describes.  It has more of them: a weight that
    two batch norms are folded into is two arrays, a frozen batch norm without parameters is one,
    and so are the factors of a learned scaling.
    """

    def _finish(self, captured: Captured) -> None:
        self._hold_pinned()

    def coordinate(self, value: Any, name: str) -> Coordinates:
        """Coordinates that hold their factors themselves."""
        shape = tuple(self.node.meta["val"].shape)
        norm = value if isinstance(value, Norm) else None
        return Coordinates(name, self.node.name, shape, norm=norm, node=self.node)

    def _scale(self, x: Labels, weight: Any) -> Labels:
        """A factor of its own for each entry, where it can have one."""
        if not isinstance(weight, Coordinates):
            return super()._scale(x, weight)
        if weight.norm is not None:
            into = self._tied(x, 1)
            out = self.forest.fresh(len(into))
            self._hold(weight, out, into)
            return self._along(out, 1)
        ids, numbers = torch.broadcast_tensors(x.ids, weight.seen().long())
        if not bool((self._first(weight, ids, numbers)[numbers] == ids).all()):
            # An entry that is read at two scales has the quotient of two others: not followed.
            self._pin(weight)
            return self._new(x.ids)
        fresh = self.forest.fresh(ids.numel()).reshape(ids.shape)
        out = self._first(weight, fresh, numbers)
        self.forest.unite(out[numbers], fresh)
        into = self._first(weight, ids, numbers)
        self._hold(weight, out.reshape(weight.shape), into.reshape(weight.shape))
        return Labels(fresh, tuple(self.node.meta["val"].shape))

    def _hold(self, weight: Coordinates, out: Tensor, into: Tensor) -> None:
        self._enter(weight, out, into)
        self._record(weight.own, weight.shape, out, into, (0, 0))

    @staticmethod
    def _first(weight: Coordinates, labels: Tensor, numbers: Tensor) -> Tensor:
        """For each stored entry the label of one place where it is read; -1 for none."""
        flat = torch.full((torch.Size(weight.shape).numel(),), -1)
        flat[numbers.reshape(-1)] = labels.reshape(-1)
        return flat
