"""Which channels share one scale: an interpretation of the lifted graph.

Every entry of every activation carries a label; a factor for each label is a rescaling of the
network exactly if entries that are added, compared or pooled have one label.  Labels are unified
where the operations demand it, so what cannot be followed is tied or fixed, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.equations import Letters, letters
from fxpath.graph.interpret import Interpretation
from fxpath.model import Captured
from fxpath.symmetry.labels import FIXED, Carried, Coordinates, Forest, Labels, Norm, compressed


class Labelling(Interpretation):
    """Runs the lifted graph on labels.

    Coordinates are moved like activations.

    Attributes:
        forest: which labels are one.
        labels: of each activation of the lifted graph.
        carried: tensor of the model -> how it is rescaled.
        entries: coordinates -> how they are rescaled; those that are not listed stay.
        rigid: labels whose factor is 1 although their channels could be removed.
        blocked: coordinates that would have to be rescaled, but are computed from parameters.
    """

    activation = Labels
    weight = Coordinates

    def __init__(self, captured: Captured, module: fx.GraphModule) -> None:
        super().__init__(module, torch.float64)
        self.forest = Forest()
        self.labels: dict[fx.Node, Labels] = {}
        self.carried: dict[str, Carried] = {}
        self.entries: dict[fx.Node, Carried] = {}
        self.rigid: list[Tensor] = []
        self.blocked: list[str] = []
        live = {key: tensor.detach().cpu() for key, tensor in captured.live().items()}
        self._names = {id(tensor): captured.tensors[key] for key, tensor in live.items()}
        self._pinned: set[str] = set()
        self._norms: list[Norm] = []
        with torch.no_grad():
            self.run(live)
        self._finish(captured)

    def _finish(self, captured: Captured) -> None:
        for norm in self._norms:
            if norm.inputs is not None and norm.outputs is not None:
                shape = tuple(norm.inputs.shape)
                self._record(norm.gamma, shape, norm.outputs, norm.inputs, (0, 0))
                self._record(norm.var, shape, norm.inputs, norm.inputs, (0, 0))
        # What is read in any other way than as a coordinate must keep its values.
        plain = {ops.coordinate, ops.folded_weight, ops.folded_bias, ops.normalizer}
        for node in self.module.graph.nodes:
            if node.op == "placeholder" and any(user.target not in plain for user in node.users):
                self._pinned.add(captured.tensors[node.target])
        for carried in self.carried.values():
            for side in (carried.out, carried.into):
                # A channel is a position on one axis, or on two (a grouped convolution).
                axes = 0 if side is None else sum(n > 1 for n in compressed(side).shape)
                if side is not None and (axes > 2 or not carried.shape):
                    self.forest.unite(side, torch.tensor(FIXED))
        self._hold_pinned()

    def _hold_pinned(self) -> None:
        for name in self._pinned & self.carried.keys():
            carried = self.carried[name]
            self.rigid += [each for each in (carried.out, carried.into) if each is not None]

    def made(self, value: Any) -> Any:
        if isinstance(value, Labels):
            self.labels[self.node] = value
        return value

    def fixed(self, x: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """The operation itself, on labels."""
        if isinstance(x, Coordinates):
            return replace(x, views=(*x.views, function))
        return self._new(compressed(function(_expanded(x)).long()))

    def join(self, pieces: list[Labels], dim: int) -> Labels:
        return self._new(compressed(torch.cat([_expanded(piece) for piece in pieces], dim).long()))

    # -- weights ----------------------------------------------------------------------------------

    def _name(self, tensor: Tensor | None) -> str | None:
        return self._names.get(id(tensor))

    def normalizer(self, gamma: Tensor | None, var: Tensor, eps: float) -> Norm:
        norm = Norm(self._name(gamma), self._name(var))
        self._norms.append(norm)
        return norm

    def folded_weight(self, weight: Tensor, factor: Norm, axis: int, groups: int) -> Any:
        return Coordinates("", self._name(weight), tuple(weight.shape), norm=factor)

    def folded_bias(
        self, bias: Tensor | None, factor: Norm, beta: Tensor | None, mean: Tensor
    ) -> Coordinates:
        return Coordinates(
            name="",
            own=self._name(bias),
            shape=tuple(mean.shape),
            norm=factor,
            beta=self._name(beta),
            mean=self._name(mean),
            computed=any(t is not None and self._name(t) is None for t in (bias, beta, mean)),
        )

    def coordinate(self, value: Any, name: str) -> Coordinates:
        if isinstance(value, Coordinates):
            return replace(value, name=name, node=self.node)
        if isinstance(value, Norm):
            shape = tuple(self.node.meta["val"].shape)
            return Coordinates(name, None, shape, norm=value, node=self.node)
        return Coordinates(name, self._name(value), tuple(value.shape), node=self.node)

    def coefficient(self, value: Tensor) -> Tensor:
        return value

    def _carry(
        self, weight: Any, out: Tensor, into: Tensor, axes: tuple[int, int], channels: Tensor
    ) -> None:
        """A weight is multiplied by the factor of its output and divided by that of its input."""
        if not isinstance(weight, Coordinates):  # fixed coefficients: nothing takes up a factor
            self.forest.unite(out, into)
            return
        if weight.norm is not None:
            self._normalized(weight.norm, channels, channels)
        stored = self._stored(weight, out), self._stored(weight, into)
        self._enter(weight, *stored)
        if weight.own is None:
            self._block(weight, out, into)
        else:
            self._record(weight.own, weight.shape, *stored, axes)

    def _stored(self, weight: Coordinates, labels: Tensor) -> Tensor:
        """Labels of the stored entries; one that is shown several times has one factor."""
        stored = weight.stored(labels)
        if weight.views:
            self.forest.unite(stored.reshape(-1)[weight.seen().long()], labels)
        return stored

    def _enter(self, weight: Coordinates, out: Tensor, into: Tensor | None) -> None:
        """Note how coordinates are rescaled; where they are used twice, in one way."""
        assert weight.node is not None
        known = self.entries.setdefault(weight.node, Carried(weight.shape, out, into, (0, 0)))
        known.out = self._merged(known.out, out)
        known.into = self._merged(known.into, into)

    def _block(self, weight: Coordinates, *labels: Tensor) -> None:
        """A factor would be needed where no tensor of the model can hold it."""
        self.rigid += labels
        self.blocked.append(weight.name)

    def _record(
        self,
        name: str | None,
        shape: tuple[int, ...],
        out: Tensor,
        into: Tensor | None,
        axes: tuple[int, int],
    ) -> None:
        """A tensor that is used twice has one factor: the labels of its uses are united."""
        if name is None:
            return
        known = self.carried.setdefault(name, Carried(shape, out, into, axes))
        known.out = self._merged(known.out, out)
        known.into = self._merged(known.into, into)

    def _merged(self, known: Tensor | None, new: Tensor | None) -> Tensor | None:
        if known is new:
            return known
        if known is None or new is None:  # one use leaves no room for a factor
            only = new if known is None else known
            assert only is not None
            self.forest.unite(only, torch.tensor(FIXED))
            return only
        self.forest.unite(known, new)
        return torch.where(known >= 0, known, new)

    def _normalized(self, norm: Norm, inputs: Tensor, outputs: Tensor) -> None:
        if norm.inputs is not None and norm.outputs is not None:
            self.forest.unite(norm.inputs, inputs)
            self.forest.unite(norm.outputs, outputs)
        norm.inputs, norm.outputs = inputs, outputs

    # -- maps -------------------------------------------------------------------------------------

    def _new(self, ids: Tensor) -> Labels:
        return Labels(ids, tuple(self.node.meta["val"].shape))

    def _tied(self, x: Labels, axis: int) -> Tensor:
        """Labels along one axis, made equal along all others: ``[length of the axis]``."""
        axis %= len(x.shape)
        moved = x.ids.movedim(axis, 0)
        rows = moved.reshape(len(moved), math.prod(moved.shape[1:]))
        self.forest.unite(rows[:, :1], rows)
        return rows[:, 0].expand(x.shape[axis])

    def _along(self, channels: Tensor, axis: int) -> Labels:
        """An activation whose labels depend on one axis."""
        rank = len(self.node.meta["val"].shape)
        shape = [1] * rank
        shape[axis % rank] = -1
        return self._new(channels.reshape(shape))

    def source(self, shape: Sequence[int]) -> Labels:
        return self._new(torch.full([1] * len(shape), FIXED))

    def constant(self, bias: Any) -> Labels:
        shape = tuple(self.node.meta["val"].shape)
        ids = self.forest.fresh(torch.Size(shape).numel()).reshape(shape)
        return self.shift(Labels(ids, shape), bias)

    def conv(self, x: Labels, weight: Any, bias: Any, *spec: Any) -> Labels:
        return self._biased(self._conv(x, weight, *spec), bias)

    def _biased(self, y: Labels, bias: Any) -> Labels:
        return y if bias is None else self.shift(y, bias)

    def _conv(
        self,
        x: Labels,
        weight: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> Labels:
        spatial = [1] * (len(x.shape) - 2)
        into = self._tied(x, 1)
        out = self.forest.fresh(self.node.meta["val"].shape[1])
        blocks = into.reshape(groups, 1, -1), out.reshape(groups, -1, 1)
        if not isinstance(weight, Coordinates):
            # Filters of the architecture: whatever they may mix has one scale.
            self.forest.unite(*blocks)
            return self._along(out, 1)
        row, column = (out, into) if not transposed else (into, out)
        rows = row.reshape(-1, 1, *spatial)
        each = len(row) // groups
        columns = column.reshape(groups, 1, -1).expand(groups, each if groups > 1 else 1, -1)
        columns = columns.reshape(-1, len(column) // groups, *spatial)
        if transposed:
            self._carry(weight, columns, rows, (1, 0), out)
        else:
            self._carry(weight, rows, columns, (0, 1), out)
        return self._along(out, 1)

    def contract(self, x: Labels, weight: Any, bias: Any, equation: str) -> Labels:
        return self._biased(self._contract(x, weight, letters(equation)), bias)

    def _contract(self, x: Labels, weight: Any, form: Letters) -> Labels:
        if form.matrix is None:
            return self._opaque(x, weight)
        axis = form.x.index(form.matrix[0])
        into, out = self._tied(x, axis), self.forest.fresh(self.node.meta["val"].shape[axis])
        if form.weight[0] == form.matrix[1]:
            self._carry(weight, out[:, None], into[None], (0, 1), out)
        else:
            self._carry(weight, out[None], into[:, None], (1, 0), out)
        return self._along(out, axis)

    def _opaque(self, x: Labels, weight: Any) -> Labels:
        """Not followed: nothing around it is rescaled."""
        self._pin(weight)
        self.forest.unite(x.ids, torch.tensor(FIXED))
        return self.source(self.node.meta["val"].shape)

    def _pin(self, weight: Any) -> None:
        if isinstance(weight, Coordinates) and weight.own is not None:
            self._pinned.add(weight.own)

    def times(self, weight: Any, factor: Any) -> Any:
        return weight

    def scale(self, x: Any, weight: Any, bias: Any = None) -> Any:
        if not isinstance(x, Labels):
            return self.times(x, weight)
        return self._biased(self._scale(x, weight), bias)

    def _scale(self, x: Labels, weight: Any) -> Labels:
        norm = weight.norm if isinstance(weight, Coordinates) else None
        if norm is None:  # both sides of the factor have one scale
            self._pin(weight)
            return self._new(x.ids)
        into = self._tied(x, 1)
        out = into if norm.gamma is None else self.forest.fresh(len(into))
        self._normalized(norm, into, out)
        self._enter(weight, out, into)
        return self._along(out, 1)

    def shift(self, x: Labels, bias: Any) -> Labels:
        if isinstance(bias, Tensor):
            ids, there = torch.broadcast_tensors(x.ids, bias != 0)
            self.rigid.append(ids[there])
            return self._new(x.ids)
        missing = bias.own is None and bias.norm is None
        if missing or bias.computed:
            self._block(bias, x.ids)
            return self._new(x.ids)
        seen = bias.seen()
        ids = x.ids
        for axis in range(-ids.dim(), 0):
            if axis < -seen.dim() or seen.shape[axis] == 1:  # one bias for the whole axis
                first = ids.narrow(axis, 0, 1)
                self.forest.unite(first, ids)
                ids = first
        stored = self._stored(bias, ids.reshape(ids.shape[-seen.dim() :] if seen.dim() else ()))
        self._enter(bias, stored, None)
        self._record(bias.own, bias.shape, stored, None, (0, 0))
        self._record(bias.beta, bias.shape, stored, None, (0, 0))
        if bias.norm is not None:
            assert bias.norm.inputs is not None
            self._record(bias.mean, bias.shape, bias.norm.inputs, None, (0, 0))
        return self._new(ids)

    # -- activations and fixed sums ---------------------------------------------------------------

    def slope(self, x: Labels, a: Any) -> Labels:
        return self._new(x.ids)

    def clamp(self, x: Labels, lo: float | None, hi: float | None) -> Labels:
        if any(ops.bound_sizes(lo, hi)):
            self.rigid.append(x.ids)
        return self._new(x.ids)

    def squash(self, x: Labels, name: str, numbers: Sequence[float], size: float) -> Labels:
        # Not homogeneous: its channels can be removed, but their scale is given.
        self.rigid.append(x.ids)
        return self._new(x.ids)

    def gate(self, x: Labels, factor: Labels, size: float) -> Labels:
        self.forest.unite(factor.ids, torch.tensor(FIXED))
        return self._new(x.ids)

    def add(self, x: Labels, y: Labels) -> Labels:
        self.forest.unite(x.ids, y.ids)
        return self._new(torch.broadcast_tensors(x.ids, y.ids)[0])

    def along(self, x: Labels, dim: int, index: Tensor, weight: Tensor) -> Labels:
        if x.ids.shape[dim] == 1:
            return self._new(x.ids)
        read = x.ids.movedim(dim, -1)[..., index]
        read = torch.where(weight != 0, read, -1)
        first = read.amax(-1)
        self.forest.unite(first[..., None], read)
        # Positions that read nothing are zero, whatever their scale.
        empty = first < 0
        first = first.masked_scatter(empty, self.forest.fresh(int(empty.sum())))
        return self._new(first.movedim(-1, dim))

    def total(self, outputs: Sequence[Labels]) -> None:
        for output in outputs:
            self.forest.unite(output.ids, torch.tensor(FIXED))


def _expanded(value: Labels) -> Tensor:
    return value.ids.expand(value.shape).double()
