"""Channel groups: what shares one scale, and every entry that a factor would change.

A hidden neuron's incoming weights and bias can be multiplied by a factor > 0, and its outgoing
weights divided by it, without changing the function or Phi.  In a model with convolutions and skip
connections the neurons are channels, and channels that are added, pooled or normalized together
have one factor: they form a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxpath.model import Captured
from fxpath.passes.followed import require_followed
from fxpath.symmetry.labelling import Labelling
from fxpath.symmetry.labels import FIXED, Carried, compressed


@dataclass(frozen=True)
class Member:
    """Entries of one tensor of the model that belong to a channel group.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        axis: axis of the tensor along which the group's channels lie.
        indices: their positions on it.
        incoming: whether these entries are multiplied by the group's factor (weights into its
            neurons, biases), or divided by it (weights out of them).  The scale and the variance of
            a batch norm inside a group are listed as both: they stay, but belong to the channel.
        within: another axis, and the positions on it that ``indices`` are meant for (the outputs
            of one group of a grouped convolution); ``None`` for all.
    """

    tensor: str
    axis: int
    indices: tuple[int, ...]
    incoming: bool
    within: tuple[int, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels with one common factor.

    Learned slopes of a PReLU are architecture and no members, though each belongs to a channel.

    Attributes:
        members: everything that reads or makes them.
        rescalable: false where a clamp (as in ReLU6) or a constant reads them, or a tensor that is
            computed: such channels can be removed, but their scale is given.
    """

    members: tuple[Member, ...]
    rescalable: bool


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The channel groups of a model; channels of inputs and outputs are in none.

    Attributes:
        groups: in order of execution.
        blocked: names of the coordinates that hold no factor as they are computed from parameters
            (pruning masks, parametrizations): their channels are not rescalable.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> import fxpath
        >>> groups = fxpath.channel_groups(model)
        >>> len(groups), groups[0].rescalable
        (3, True)
        >>> for member in groups[1].members:
        ...     print(member.tensor, member.axis, member.indices, member.incoming)
        0.weight 0 (1,) True
        0.bias 0 (1,) True
        2.weight 1 (1,) False
    """

    groups: tuple[ChannelGroup, ...]
    blocked: tuple[str, ...]
    _numbers: Mapping[str, tuple[Tensor | None, Tensor | None]]
    _activations: Mapping[fx.Node, Tensor]
    _entries: Mapping[fx.Node, tuple[Tensor | None, Tensor | None]]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ChannelGroup:
        return self.groups[index]

    def __repr__(self) -> str:
        rescalable = int(self.rescalable.sum())
        return f"<ChannelGroups: {len(self)} channels, {rescalable} of them rescalable>"

    @property
    def rescalable(self) -> Tensor:
        """Which groups are rescalable, bool ``[groups]``."""
        return torch.tensor([group.rescalable for group in self.groups], dtype=torch.bool)


def open_groups(captured: Captured, lifted: fx.GraphModule) -> ChannelGroups:
    """Groups of a model all of whose weights can take up a factor."""
    if not isinstance(captured.source, nn.Module):
        raise TypeError("an ExportedProgram is not rescaled: pass the nn.Module")
    found = find_groups(captured, lifted)
    if found.blocked:
        raise ValueError(
            f"{', '.join(found.blocked)}: computed from other parameters, so no factor can be "
            "multiplied in; make them parameters first (torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return found


def find_groups(captured: Captured, lifted: fx.GraphModule) -> ChannelGroups:
    """Groups of a lifted network, numbered in order of execution."""
    require_followed(captured, lifted, "a factor of a channel must not move what gates read")
    labelling = Labelling(captured, lifted)
    roots = labelling.forest.roots()
    rigid = torch.zeros(len(roots), dtype=torch.bool)
    for labels in labelling.rigid:
        rigid[roots[labels[labels >= 0]]] = True
    used = torch.zeros(len(roots), dtype=torch.bool)
    for carried in labelling.carried.values():
        for side in (carried.out, carried.into):
            if side is not None:
                used[roots[side[side >= 0]]] = True
    used[FIXED] = False
    # Groups are numbered by their smallest label; -1, the last place of a table, is for the rest.
    number = torch.full((len(roots) + 1,), -1)
    number[:-1][used] = torch.arange(int(used.sum()))
    of = torch.cat([number[roots], number[-1:]])
    members: list[list[Member]] = [[] for _ in range(int(used.sum()))]
    numbers: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name, carried in labelling.carried.items():
        out, into = (None if x is None else of[x] for x in (carried.out, carried.into))
        numbers[name] = out, into
        _list_members(members, name, carried, out, True)
        _list_members(members, name, carried, into, False)
    fixed = rigid[used]
    groups = [ChannelGroup(tuple(m), not bool(fixed[i])) for i, m in enumerate(members)]
    activations = {
        node: torch.where(of[labels.ids] < 0, len(groups), of[labels.ids])
        for node, labels in labelling.labels.items()
    }
    entries = {
        node: (
            of[carried.out] if carried.out is not None else None,
            of[carried.into] if carried.into is not None else None,
        )
        for node, carried in labelling.entries.items()
    }
    return ChannelGroups(tuple(groups), tuple(labelling.blocked), numbers, activations, entries)


def _list_members(
    members: list[list[Member]],
    name: str,
    carried: Carried,
    numbers: Tensor | None,
    incoming: bool,
) -> None:
    """Sort the entries of one tensor by group."""
    if numbers is None or 0 in carried.shape:
        return
    numbers = compressed(numbers)
    varying = [axis for axis, size in enumerate(numbers.shape) if size > 1]
    axis = varying[-1] if varying else carried.axes[0 if incoming else 1]
    by_group: dict[int, dict[tuple[int, ...], list[int]]] = {}
    moved = numbers.expand(
        [n if d == axis else numbers.shape[d] for d, n in enumerate(carried.shape)]
    )
    for row, line in enumerate(moved.movedim(axis, -1).reshape(-1, carried.shape[axis]).tolist()):
        places: dict[int, list[int]] = {}
        for position, group in enumerate(line):
            places.setdefault(group, []).append(position)
        for group, positions in places.items():
            by_group.setdefault(group, {}).setdefault(tuple(positions), []).append(row)
    for group, blocks in by_group.items():
        if group < 0:
            continue
        for indices, rows in blocks.items():
            within = (varying[0], tuple(rows)) if len(varying) > 1 else None
            members[group].append(Member(name, axis, indices, incoming, within))
