"""Where a model's channels lie: every tensor entry that goes with a channel, and what ties it.

:class:`Channels` draws the conclusions of what :class:`fxpath.pruning.walk.Walk` notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxpath.errors import source_line
from fxpath.model import Captured
from fxpath.pruning.walk import Walk
from fxpath.symmetry.labels import compressed


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


class Channels(Walk):
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
        for labels, node, names in self._loads:
            self.keep(self._channels(labels), _loaded(node, names))
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


def _loaded(node: fx.Node, names: Sequence[str]) -> Kept:
    """Why channels stay that are not zero where all that leads into them is."""
    reason = "the model's code adds a constant to them"
    if names:
        reason = (
            f"the model's code adds a constant to them, made from {', '.join(names)}: register "
            "what is a bias as a parameter, and what is a batch norm as one of torch.nn"
        )
    return Kept(reason, source_line(node.meta["origin"]) if node.meta.get("origin") else "")
