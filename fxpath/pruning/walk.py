"""The walk over a lifted graph that notes what goes with each channel.

It labels entries as :mod:`fxpath.symmetry.labelling` does for rescaling, and notes more: what is
multiplied with a channel without having a scale of its own (slopes, gains, fixed filters), where
the model's code picks channels by their position, and grouped convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import RELABELLING, SLICE
from fxpath.graph.edit import inputs_first
from fxpath.graph.leaves import LEAVES
from fxpath.graph.schema import arguments, bias_of
from fxpath.model import Captured
from fxpath.symmetry.labelling import Labelling
from fxpath.symmetry.labels import Coordinates, Labels, compressed


class Walk(Labelling):
    """Runs the lifted graph on labels, and notes where they meet the model's tensors.

    Attributes:
        uses: weights in order of use, with the operations that read them.
    """

    def __init__(self, captured: Captured, lifted: fx.GraphModule) -> None:
        #: Tensor, and the label of each entry, -1 for none.
        self._beside: list[tuple[str, Tensor]] = []
        #: What is picked by position along an axis, before and after.
        self._picked: list[tuple[Labels, int, Labels, fx.Node]] = []
        #: Tensor, its shape, labels, their axis, and whether the entries lead into them.
        self._sides: list[tuple[str, tuple[int, ...], Tensor, int, bool]] = []
        #: Weight of a grouped convolution -> groups, and whether it is transposed.
        self._groups: dict[str, tuple[int, bool]] = {}
        self._scored: list[tuple[str, Tensor, Tensor | None]] = []
        #: Weight -> labels that its layer makes, and their axis.
        self._weights: dict[str, tuple[Tensor, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.uses: list[tuple[str, fx.Node]] = []
        #: Labels of what is not zero without weights, the operation, and tensors that make it so.
        self._loads: list[tuple[Tensor, fx.Node, tuple[str, ...]]] = []
        self._clamped: list[Tensor] = []
        self._placeholders = captured.tensors
        super().__init__(captured, lifted)

    def _carry(
        self, weight: Any, out: Tensor, into: Tensor, axes: tuple[int, int], channels: Tensor
    ) -> None:
        if isinstance(weight, Coordinates) and weight.views:
            axes = _stored_axis(weight, out, axes[0]), _stored_axis(weight, into, axes[1])
        super()._carry(weight, out, into, axes, channels)
        if isinstance(weight, Coordinates) and weight.own is not None:
            stored = weight.stored(out), weight.stored(into)
            self._scored.append((_base(weight.name), *stored))
            if self.node.target is not ops.scale:
                self.uses.append((weight.own, self.node))
                self._weights.setdefault(weight.own, (stored[0], axes[0]))
                self._shapes[weight.own] = weight.shape

    def _record(
        self,
        name: str | None,
        shape: tuple[int, ...],
        out: Tensor,
        into: Tensor | None,
        axes: tuple[int, int],
    ) -> None:
        """Uses of one tensor need no common factor here: they are tied by their positions."""
        if name is not None:
            self._sides.append((name, shape, out, axes[0], True))
            if into is not None:
                self._sides.append((name, shape, into, axes[1], False))

    def _enter(self, weight: Coordinates, out: Tensor, into: Tensor | None) -> None:
        """Nor do uses of one array of coordinates."""

    def _conv(self, x: Labels, weight: Any, *spec: Any) -> Labels:
        y = super()._conv(x, weight, *spec)
        groups, transposed = int(spec[5]), bool(spec[3])
        if not isinstance(weight, Coordinates):
            first = x.ids if transposed else y.ids
            rows = self._tied(Labels(first, (x if transposed else y).shape), 1)
            self._note(self.node.args[1], rows.reshape(-1, *[1] * (len(x.shape) - 1)))
        elif groups > 1 and weight.own is not None and not weight.views:
            self._groups[weight.own] = groups, transposed
        return y

    def shift(self, x: Labels, bias: Any) -> Labels:
        y = super().shift(x, bias)
        if isinstance(bias, Tensor):
            self._note(bias_of(self.node), y.ids)
            ids, there = torch.broadcast_tensors(y.ids, bias != 0)
            behind = _behind(bias_of(self.node))
            names = dict.fromkeys(self._placeholders[str(node.target)] for node, _ in behind)
            self._loads.append((ids[there], self.node, tuple(names)))
        elif isinstance(bias, Coordinates) and (bias.own or bias.beta or bias.norm):
            seen = bias.seen()
            ids = y.ids.reshape(y.ids.shape[-seen.dim() :] if seen.dim() else ())
            self._scored.append((_base(bias.name), bias.stored(ids), None))
        return y

    def _scale(self, x: Labels, weight: Any) -> Labels:
        y = super()._scale(x, weight)
        if isinstance(weight, Coordinates) and weight.norm is not None:
            sides = y.ids.flatten(), self._tied(x, 1)
            self._scored.append((_base(weight.name), *sides))
        else:
            self._note(self.node.args[1], y.ids)
        return y

    def clamp(self, x: Labels, lo: float | None, hi: float | None) -> Labels:
        if any(ops.bound_sizes(lo, hi)):
            self._clamped.append(x.ids.flatten())
        if (lo or 0) > 0 or (hi or 0) < 0:
            self._loads.append((x.ids, self.node, ()))
        return super().clamp(x, lo, hi)

    def slope(self, x: Labels, a: Any) -> Labels:
        y = super().slope(x, a)
        self._note(self.node.args[1], y.ids)
        return y

    def move(self, target: Callable[..., Tensor], *args: Any) -> Any:
        y = super().move(target, *args)
        if target is SLICE and isinstance(args[0], Labels):
            self._picked.append((args[0], args[1], y, self.node))
        return y

    def along(self, x: Labels, dim: int, index: Tensor, weight: Tensor) -> Labels:
        y = super().along(x, dim, index, weight)
        self._picked.append((x, dim, y, self.node))
        return y

    def _note(self, operand: Any, labels: Tensor) -> None:
        """Tensors of the model that meet these labels entry by entry, with broadcasting."""
        for node, seen in _behind(operand):
            shape = node.meta["val"].shape
            if shape.numel() == 1:
                continue
            places, met = torch.broadcast_tensors(seen, labels)
            stored = torch.full((shape.numel(),), -1)
            stored[places.flatten()] = met.flatten()
            # One entry for several channels is none's own.
            stored[places[stored[places] != met]] = -1
            self._beside.append((self._placeholders[str(node.target)], stored.reshape(shape)))


def _stored_axis(weight: Coordinates, side: Tensor, axis: int) -> int:
    """The axis of a tensor along which a side of a weight lies that is read through views."""
    places = compressed(weight.stored(torch.arange(side.numel()).reshape(side.shape)))
    varying = [axis for axis, size in enumerate(places.shape) if size > 1]
    return varying[0] if len(varying) == 1 else axis


def _base(name: str) -> str:
    """The name under which scores of several uses of one weight add up."""
    return name.split(":", 1)[0]


def _behind(operand: Any) -> list[tuple[fx.Node, Tensor]]:
    """The tensors that an operand is computed from, entry by entry.

    Returns:
        For each placeholder the place in it of each entry of the operand, ``[*operand.shape]``.
    """
    known: dict[fx.Node, list[tuple[fx.Node, Tensor]]] = {}
    for node in inputs_first(operand, known) if isinstance(operand, fx.Node) else ():
        known[node] = _seen(node, known)
    return known[operand] if known else []


def _seen(
    node: fx.Node, known: Mapping[fx.Node, list[tuple[fx.Node, Tensor]]]
) -> list[tuple[fx.Node, Tensor]]:
    if node.op == "placeholder":
        shape = node.meta["val"].shape
        return [(node, torch.arange(shape.numel()).reshape(shape))]
    inputs = node.all_input_nodes
    if node.target in RELABELLING and len(inputs) == 1:
        rest: Sequence[Any] = arguments(node)[1:]
        view: Any = node.target
        return [(origin, view(seen, *rest, **node.kwargs)) for origin, seen in known[inputs[0]]]
    found = [each for one in inputs for each in known[one]]
    if node.target in LEAVES:
        return found
    shape, tags = node.meta["val"].shape, getattr(node.target, "tags", ())
    alike = len(inputs) == 1 and inputs[0].meta["val"].shape == shape
    if torch.Tag.pointwise not in tags and not alike:
        return []
    return [(origin, seen.broadcast_to(shape)) for origin, seen in found]
