"""Where a model's channels lie: every tensor entry that goes with a channel, and what ties it.

:class:`Channels` reads the lifted graph as :mod:`fxpath.symmetry.labelling` does for rescaling, and
notes more: what is multiplied with a channel without having a scale of its own (slopes, gains,
fixed filters), where the model's code picks channels by their position, and grouped convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath import ops
from fxpath.capture import Captured
from fxpath.errors import source_line
from fxpath.naming import RELABELLING
from fxpath.schema import arguments
from fxpath.symmetry.labelling import Labelling
from fxpath.symmetry.labels import Coordinates, Labels, compressed

__all__ = ["Axis", "Channels", "Group", "Kept"]

aten = torch.ops.aten

_NUMBERS = {ops.coordinate, ops.coefficient}


@dataclass(frozen=True)
class Kept:
    """Why a channel stays.

    Attributes:
        reason: what is in the way.
        source_line: ``file:line: code`` of it; empty where no code is in the way.
    """

    reason: str
    source_line: str = ""


@dataclass(frozen=True)
class Axis:
    """The channels along one axis of a tensor.

    Attributes:
        tensor: qualified name.
        axis: of the tensor.
        channels: the channel at each position, < 1 for none, ``[positions]``; for axis 1 of a
            grouped convolution's weight ``[groups, positions]``.
        incoming: whether the entries lead into the channels (weights, biases, means): where these
            are zero, so is the channel.
    """

    tensor: str
    axis: int
    channels: Tensor
    incoming: bool


@dataclass(frozen=True)
class Group:
    """The weight of a grouped convolution.

    Attributes:
        inputs: channels that each group reads, ``[groups, each]``.
        outputs: channels that each group makes, ``[groups, each]``.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def balanced(self) -> bool:
        """Whether the groups stay, and lose as many channels each; else whole groups go."""
        return min(self.inputs.shape[1], self.outputs.shape[1]) > 1


class Channels(Labelling):
    """Runs the lifted graph on labels, and finds the axes along which channels lie.

    A channel is a number >= 1; 0 stands for inputs and outputs, -1 for entries that nothing reads.

    Attributes:
        axes: all axes of the model's tensors along which channels lie.
        outputs: layer's weight -> the channels that it makes, in order, ``[channels]``.
        grouped: weight of a grouped convolution -> its groups, for each use.
        uses: weights in order of use, with the operations that read them.
        scored: for each use of coordinates their name, channels that its entries lead into, in the
            tensor's shape (length 1 where they do not depend on an axis), and the channels that
            they come from.
        clamped: which channels a clamp reads, whose bounds are neurons of their own.
        kept: channel -> why it cannot be removed.
        loaded: channels of these that stay for nothing but a constant in the model's code.
        count: of the numbers that channels have.
    """

    def __init__(self, captured: Captured, lifted: fx.GraphModule) -> None:
        self._beside: list[tuple[str, Tensor]] = []
        self._picked: list[tuple[Labels, int, Labels, fx.Node]] = []
        self._sides: list[tuple[str, tuple[int, ...], Tensor, int, bool]] = []
        self._groups: dict[str, tuple[int, bool]] = {}
        self._scored: list[tuple[str, Tensor, Tensor | None]] = []
        self._weights: dict[str, tuple[Tensor, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.uses: list[tuple[str, fx.Node]] = []
        self._kept: list[tuple[Tensor, Kept]] = []
        self._clamped: list[Tensor] = []
        self._placeholders = captured.tensors
        super().__init__(captured, lifted)
        roots = self.forest.roots()
        self.count = len(roots)
        self._roots = torch.cat([roots, torch.tensor([-1])])
        self.clamped = torch.zeros(self.count + 1, dtype=torch.bool)
        for labels in self._clamped:
            self.clamped[self._channels(labels)] = True
        self.kept: dict[int, Kept] = {}
        self.axes: list[Axis] = []
        self.grouped: dict[str, list[Group]] = {}
        for before, dim, after, node in self._picked:
            if self._varies(before.ids, dim) or self._varies(after.ids, dim):
                why = Kept(
                    "the model's code picks, joins or pads these channels by their position",
                    source_line(node.meta["origin"]),
                )
                self.keep(self._channels(before.ids), why)
                self.keep(self._channels(after.ids), why)
        self._list_axes()
        for node, found in self.labels.items():
            self._check_grid(node, self._channels(found.ids))
        self.scored = [
            (name, self._entries(out), None if into is None else self._entries(into))
            for name, out, into in self._scored
        ]
        self.outputs = {name: self._made(name, *made) for name, made in self._weights.items()}
        self._keep_foreign(captured)
        others = set(self.kept)
        for labels, why in self._kept:
            self.keep(self._channels(labels), why)
        self.loaded = self.kept.keys() - others

    def keep(self, channels: Tensor, why: Kept) -> None:
        """Note why channels stay, unless a reason is known."""
        for channel in channels.unique().tolist():
            if channel > 0:
                self.kept.setdefault(channel, why)

    def at(self, node: fx.Node) -> tuple[set[int], set[int]]:
        """The channels that an operation of the captured graph reads, and those that it makes."""
        read, made = set[int](), set[int]()
        for lifted in self.module.graph.nodes:
            if lifted.meta.get("origin") is node:
                for each in (lifted, *lifted.all_input_nodes):
                    if each in self.labels:
                        channels = self._channels(self.labels[each].ids).unique().tolist()
                        (made if each.meta.get("origin") is node else read).update(channels)
        return read, made

    def of(self, node: fx.Node) -> Tensor:
        """Channels at the entries of a activation; length 1 along axes where all are alike."""
        return self._channels(self.labels[node].ids)

    def shown(self, node: fx.Node) -> Tensor | None:
        """Channels at the entries of what an operation of the captured graph makes."""
        last = None
        for lifted in self.module.graph.nodes:
            if lifted.meta.get("origin") is node and lifted in self.labels:
                last = lifted
        return None if last is None else self._channels(self.labels[last].ids)

    # -- what the walk notes ----------------------------------------------------------------------

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

    def conv(self, x: Labels, weight: Any, *spec: Any) -> Labels:
        y = super().conv(x, weight, *spec)
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
            self._note_at(self.node.args[-1], y)
            ids, there = torch.broadcast_tensors(y.ids, bias != 0)
            self._keep_loaded(ids[there])
        elif isinstance(bias, Coordinates) and (bias.own or bias.beta or bias.norm):
            seen = bias.seen()
            ids = y.ids.reshape(y.ids.shape[-seen.dim() :] if seen.dim() else ())
            self._scored.append((_base(bias.name), bias.stored(ids), None))
        return y

    def scale(self, x: Any, weight: Any) -> Any:
        y = super().scale(x, weight)
        if isinstance(x, Labels):
            if isinstance(weight, Coordinates) and weight.norm is not None:
                sides = y.ids.flatten(), self._tied(x, 1)
                self._scored.append((_base(weight.name), *sides))
            else:
                self._note_at(self.node.args[1], y)
        return y

    def clamp(self, x: Labels, lo: float | None, hi: float | None) -> Labels:
        self._clamped.append(x.ids.flatten())
        if (lo or 0) > 0 or (hi or 0) < 0:
            self._keep_loaded(x.ids)
        return super().clamp(x, lo, hi)

    def _keep_loaded(self, labels: Tensor) -> None:
        """Channels that are not zero where all that leads into them is."""
        line = source_line(self.node.meta["origin"]) if self.node.meta.get("origin") else ""
        self._kept.append((labels, Kept("the model's code adds a constant to them", line)))

    def slope(self, x: Labels, a: Any) -> Labels:
        y = super().slope(x, a)
        self._note_at(self.node.args[1], y)
        return y

    def move(self, target: Callable[..., Tensor], *args: Any) -> Any:
        y = super().move(target, *args)
        if target is aten.slice.Tensor and isinstance(args[0], Labels):
            self._picked.append((args[0], args[1], y, self.node))
        return y

    def along(self, x: Labels, dim: int, index: Tensor, weight: Tensor) -> Labels:
        y = super().along(x, dim, index, weight)
        self._picked.append((x, dim, y, self.node))
        return y

    def _note_at(self, operand: Any, y: Labels) -> None:
        """A tensor that meets an activation entry by entry, with broadcasting."""
        if isinstance(operand, fx.Node):
            shape = tuple(operand.meta["val"].shape)
            ids = y.ids
            for axis in range(-ids.dim(), 0):
                # One entry for the whole axis: it is no channel's own.
                if axis < -len(shape) or shape[axis] == 1:
                    ids = ids.narrow(axis, 0, 1)
            self._note(operand, ids.reshape(ids.shape[-len(shape) :] if shape else ()))

    def _note(self, operand: Any, labels: Tensor) -> None:
        """The tensor of the model behind an operand goes with these labels."""
        found = _behind(operand)
        if found is not None and found[1].numel() > 1:
            name, seen = self._placeholders[str(found[0].target)], found[1]
            stored = torch.full((found[2].numel(),), -1)
            stored[seen.reshape(-1)] = labels.expand(seen.shape).reshape(-1)
            self._beside.append((name, stored.reshape(found[2])))

    # -- what follows from it ---------------------------------------------------------------------

    def _channels(self, labels: Tensor) -> Tensor:
        return self._roots[labels]

    def _entries(self, labels: Tensor) -> Tensor:
        return compressed(self._channels(labels))

    def _varies(self, ids: Tensor, dim: int) -> bool:
        return compressed(self._channels(ids)).shape[dim] > 1

    def _list_axes(self) -> None:
        for name in self._groups:
            self._list_grouped(name)
        variances = {norm.var for norm in self._norms}
        for name, shape, labels, axis, incoming in self._sides:
            if name not in self._groups:
                # A variance of zero would be divided by.
                self._list(name, shape, labels, axis, incoming and name not in variances)
        for name, labels in self._beside:
            shape = tuple(labels.shape)
            # One channel has all entries: which axis it is on does not matter, as it stays.
            longest = max(range(len(shape)), key=shape.__getitem__)
            self._list(name, shape, labels, longest, False)

    def _list(
        self, name: str, shape: tuple[int, ...], labels: Tensor, axis: int, incoming: bool
    ) -> None:
        channels = compressed(self._channels(labels))
        varying = [axis for axis, size in enumerate(channels.shape) if size > 1]
        if len(varying) > 1:
            self.keep(channels, Kept(f"they lie along several axes of {name}"))
        elif varying:
            self.axes.append(Axis(name, varying[0], channels.flatten(), incoming))
        elif shape and channels.numel() == 1:
            whole = channels.flatten().expand(shape[axis])
            self.axes.append(Axis(name, axis, whole, incoming))

    def _list_grouped(self, name: str) -> None:
        groups, transposed = self._groups[name]
        sides = [side[1:4] for side in self._sides if side[0] == name]
        shape = sides[0][0]
        tail = [1] * (len(shape) - 2)
        ends: list[list[Tensor]] = [[], []]
        for _, labels, axis in sides:
            if axis == 0:
                rows = self._channels(labels).expand(shape[0], *labels.shape[1:])
                ends[0].append(rows.flatten())
            else:
                wide = self._channels(labels).expand(*shape[:2], *tail)
                ends[1].append(wide.reshape(groups, -1, shape[1])[:, 0])
        for first, second in zip(*ends, strict=True):
            pair = first.reshape(groups, -1), second
            group = Group(*(pair if transposed else pair[::-1]))
            self.grouped.setdefault(name, []).append(group)
            self.axes.append(Axis(name, 0, first, not transposed))
            if group.balanced:
                self.axes.append(Axis(name, 1, second, transposed))

    def _made(self, name: str, out: Tensor, axis: int) -> Tensor:
        if name in self.grouped:
            return self.grouped[name][0].outputs.flatten()
        channels = compressed(self._channels(out)).flatten()
        return channels if len(channels) > 1 else channels.expand(self._shapes[name][axis])

    def _check_grid(self, node: fx.Node, channels: Tensor) -> None:
        """A channel is whole slices along one axis of each activation; else it stays."""
        channels = compressed(channels)
        varying = [axis for axis, size in enumerate(channels.shape) if size > 1]
        if len(varying) < 2:
            return
        counts = torch.bincount(channels.flatten(), minlength=self.count)
        whole = torch.zeros(self.count, dtype=torch.bool)
        for axis in varying:
            lines = channels.movedim(axis, 0).flatten(1)
            places = torch.arange(len(lines))[:, None].expand_as(lines)
            distinct = torch.stack([lines.flatten(), places.flatten()]).unique(dim=1)[0]
            whole |= torch.bincount(distinct, minlength=self.count) * lines.shape[1] == counts
        broken = ((counts > 0) & ~whole).nonzero().flatten()
        origin = node.meta.get("origin")
        line = "" if origin is None else source_line(origin)
        self.keep(broken, Kept("the model's code splits or shuffles its channels here", line))

    def _keep_foreign(self, captured: Captured) -> None:
        """Channels of tensors that modules hold in a way that is not known here."""
        source = captured.source
        assert isinstance(source, nn.Module)
        holders: dict[str, nn.Module] = {}
        for path, module in source.named_modules(remove_duplicate=False):
            tensors = (*module.named_parameters(path, False), *module.named_buffers(path, False))
            holders.update({name: module for name, _ in tensors})
        for axis in self.axes:
            module = holders.get(axis.tensor)
            if module is None:
                why = f"{axis.tensor} is no parameter and no buffer: register it"
                self.keep(axis.channels, Kept(why))
            elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
                kind = type(module).__name__
                self.keep(axis.channels, Kept(f"a {kind} has them, which is not made smaller"))


def _stored_axis(weight: Coordinates, side: Tensor, axis: int) -> int:
    """The axis of a tensor along which a side of a weight lies that is read through views."""
    places = compressed(weight.stored(torch.arange(side.numel()).reshape(side.shape)))
    varying = [axis for axis, size in enumerate(places.shape) if size > 1]
    return varying[0] if len(varying) == 1 else axis


def _base(name: str) -> str:
    """The name under which scores of several uses of one weight add up."""
    return name.split(":", 1)[0]


def _behind(operand: Any) -> tuple[fx.Node, Tensor, torch.Size] | None:
    """The tensor that an operand shows: placeholder, its entries as they are read, its shape.

    ``None`` for numbers and for what is computed from several tensors.
    """
    views: list[fx.Node] = []
    node = operand
    while isinstance(node, fx.Node) and node.op == "call_function":
        inputs = node.all_input_nodes
        if not inputs:
            return None
        if node.target in RELABELLING:
            if len(inputs) > 1:
                return None
            views.append(node)
        elif node.target not in _NUMBERS and (
            len(inputs) > 1 or inputs[0].meta["val"].shape != node.meta["val"].shape
        ):
            return None
        node = inputs[0]
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    shape = node.meta["val"].shape
    seen = torch.arange(shape.numel()).reshape(shape)
    for view in reversed(views):
        rest: Sequence[Any] = arguments(view)[1:]
        seen = view.target(seen, *rest, **view.kwargs)  # type: ignore[operator]
    return node, seen, shape
