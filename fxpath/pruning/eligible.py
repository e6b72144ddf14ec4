"""Which entries of a model may be pruned: where they are stored, and what they are read as."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils import prune as torch_prune

from fxpath.graph import ops
from fxpath.graph.edit import inputs_first
from fxpath.graph.equations import letters
from fxpath.graph.leaves import LEAVES
from fxpath.graph.links import on_paths
from fxpath.graph.schema import arguments, bias_of
from fxpath.model import Captured, named_tensors
from fxpath.pairs.pair import Side
from fxpath.private import forward_pre_hooks, pruned_name
from fxpath.pruning.choices import Choice, listed, matches, shown
from fxpath.pruning.surgery import places

_WEIGHING = (ops.conv, ops.contract)


@dataclass(frozen=True)
class Eligible:
    """Entries of theta that become zero where entries of one parameter do.

    Attributes:
        name: of the coordinates, as in the scores.
        key: placeholder of the parameter in the captured graph.
        parameter: its qualified name.
        shape: of both.
        weight: whether they are a weight, or else a bias.
        inputs: axis along which the input channels of a weight lie, where it has one.
        together: how many input channels in a row are read by one output channel.
    """

    name: str
    key: str
    parameter: str
    shape: tuple[int, ...]
    weight: bool
    inputs: int | None = None
    together: int = 0

    @property
    def entries(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def choose(
    model: nn.Module,
    found: Sequence[Eligible],
    include: Choice | None,
    exclude: Choice,
) -> list[Eligible]:
    """Those that ``include`` chooses (all by default) and ``exclude`` does not.

    Raises:
        ValueError: if a pattern or a type matches nothing, or if nothing is left.
    """
    wanted = None if include is None else listed(include)
    spared = listed(exclude)
    ties = places(model)
    # A tied parameter is meant by each of its names.
    names = {each.name: [each.name, *ties.get(each.parameter, ())] for each in found}
    for choice in (*(wanted or ()), *spared):
        if not any(matches(model, names[each.name], choice) for each in found):
            known = ", ".join(each.name for each in found[:8]) + ", ..." * (len(found) > 8)
            raise ValueError(f"{shown(choice)} matches no parameter that can be pruned: {known}")
    chosen = [
        each
        for each in found
        if (wanted is None or any(matches(model, names[each.name], choice) for choice in wanted))
        and not any(matches(model, names[each.name], choice) for choice in spared)
    ]
    if not chosen:
        raise ValueError("nothing is left to prune: include and exclude spare every parameter")
    return chosen


def find_eligible(captured: Captured, lifted: fx.GraphModule, biases: bool) -> list[Eligible]:
    """Weights of convolutions and linear maps in order of execution, and biases if asked for.

    A bias that batch normalization follows is a part of another one, which its zero is not the zero
    of: it is not eligible.  A weight that is computed has no ``key``, see :func:`check_stored`.
    """
    found: dict[str, Eligible] = {}
    counted = on_paths(lifted.graph)
    for node in lifted.graph.nodes:
        if node.target is not ops.coordinate or node not in counted:
            continue
        value, name = arguments(node)
        readers = list(_readers(node))
        reading = [user for user, adds in readers if not adds]
        added = len(reading) < len(readers)
        if reading:
            own = arguments(value)[0] if value.target is ops.folded_weight else value
            axes = {_inputs(user, node) for user in reading}
            axis, together = axes.pop() if len(axes) == 1 else (None, 0)
            known = found.get(name)
            if known is not None and known.inputs != axis:
                axis = None
        elif biases and added and value.target is not ops.folded_bias:
            own, axis, together = value, None, 0
        else:
            continue
        key = own.target if own.op == "placeholder" else _pruned_key(captured, own, name)
        parameter = captured.tensors[key] if key else ""
        shape = tuple(own.meta["val"].shape)
        found[name] = Eligible(name, key, parameter, shape, bool(reading), axis, together)
    return list(found.values())


def check_stored(model: nn.Module, side: Side, chosen: Sequence[Eligible]) -> None:
    """Refuse entries that are not zero where entries of a registered parameter are.

    Raises:
        ValueError: naming them, and what to do.
    """
    computed = [each.name for each in chosen if not each.key]
    if computed:
        raise ValueError(
            f"{', '.join(computed)}: computed from other parameters, so no entry can be set to "
            "zero; make them parameters first (torch.nn.utils.parametrize."
            "remove_parametrizations, torch.nn.utils.prune.remove), or spare them with exclude"
        )
    registered = named_tensors(model)
    loose = [each.parameter for each in chosen if each.parameter not in registered]
    if loose:
        raise ValueError(
            f"{', '.join(loose)}: no registered parameter, so no state dict holds its zeros; "
            "register it (nn.Parameter as an attribute, nn.ParameterList), or spare it with exclude"
        )
    state = model.state_dict()
    renamed = [each.parameter for each in chosen if each.parameter not in state]
    if renamed:
        raise ValueError(
            f"{', '.join(renamed)}: not in the model's state dict under that name, which a hook on "
            "state_dict() changes, so that it cannot hold the zeros; prune the module inside"
        )
    _check_weights_only(side, chosen)


def _check_weights_only(side: Side, chosen: Sequence[Eligible]) -> None:
    """Refuse parameters that are read as something else, too, which other numbers come from."""
    names = {each.key: each.name for each in chosen}
    masked = {each.name for each in chosen if each.name != each.parameter}
    captured = side.captured
    for each in chosen:
        if each.parameter in captured.baked:
            raise ValueError(
                f"{each.name}: the model also makes a mask, a position or a Python number of it, "
                "which pruning would change; spare it with exclude"
            )
    for leaf in side.nodes:
        read = arguments(leaf)[0] if leaf.target in LEAVES else leaf
        own, factor = arguments(read)[:2] if read.target is ops.folded_weight else (read, None)
        if leaf.target is ops.coordinate and (
            own.op == "placeholder" or arguments(leaf)[1] in masked
        ):
            others = [factor] if isinstance(factor, fx.Node) else []
        else:
            others = [read]
        inputs = {str(n.target) for other in others for n in inputs_first(other, ())}
        for key in inputs & names.keys():
            by = "a slope or a fixed number"
            if leaf.target is ops.coordinate:
                folded = read.target in (ops.folded_weight, ops.folded_bias)
                by = f"{arguments(leaf)[1]}{' with its batch normalization' if folded else ''}"
            raise ValueError(
                f"{names[key]}: {by} is computed from it, too, and would not become zero with it, "
                "but another number; spare it with exclude"
            )


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Operations that read coordinates, through views and numbers in front; whether as a bias."""
    for user in node.users:
        if bias_of(user) is node:
            yield user, True
        elif user.target in _WEIGHING:
            yield user, False
        elif user.target is not ops.scale or arguments(user)[0] is node:
            yield from _readers(user)


def _inputs(reader: fx.Node, weight: fx.Node) -> tuple[int | None, int]:
    """Axis of a weight's input channels, and how many of them meet in one output channel."""
    if arguments(reader)[1] is not weight:
        return None, 0  # read through a view
    shape = weight.meta["val"].shape
    if reader.target is ops.conv:
        transposed, groups = arguments(reader)[6], int(arguments(reader)[8])
        return (0, shape[0] // groups) if transposed else (1, shape[1])
    form = letters(arguments(reader)[3]) if reader.target is ops.contract else None
    if form is not None and form.matrix is not None:
        axis = form.weight.index(form.matrix[0])
        return axis, shape[axis]
    return None, 0


def _pruned_key(captured: Captured, value: fx.Node, name: str) -> str:
    """Placeholder of the parameter behind a weight of ``torch.nn.utils.prune``, else nothing.

    Such a weight is its parameter times a mask, entry by entry.
    """
    module, _, attribute = name.rpartition(".")
    assert isinstance(captured.source, nn.Module)
    holder = dict(captured.source.named_modules()).get(module)
    hooks = () if holder is None else forward_pre_hooks(holder).values()
    methods = [hook for hook in hooks if isinstance(hook, torch_prune.BasePruningMethod)]
    if not any(pruned_name(method) == attribute for method in methods):
        return ""
    base = f"{module}.{attribute}" if module else attribute
    known: set[fx.Node] = set()
    steps = inputs_first(value, known)
    read = {captured.tensors.get(str(n.target)): n.target for n in steps if n.op == "placeholder"}
    same = all(n.meta["val"].shape == value.meta["val"].shape for n in steps)
    return str(read[f"{base}_orig"]) if same and read.keys() == _stored(base) else ""


def _stored(base: str) -> set[str]:
    return {f"{base}_orig", f"{base}_mask"}
