# ruff: noqa: D102 -- methods are named after the functions of fxpath.ops that they interpret
"""Two sets of weights for one network: checks, effective parameters, and what is common to both.

A *leaf* is a place where the lifted graph reads effective parameters (``ops.coordinate``) or fixed
numbers (``ops.coefficient``).  Both networks are evaluated leaf by leaf, so that only one layer of
each exists in float64 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxpath import ops
from fxpath.capture import Captured, Model, check_finite, named_tensors
from fxpath.errors import module_path
from fxpath.interpret import Interpretation
from fxpath.passes.links import mark_static, static
from fxpath.program import build
from fxpath.schema import arguments

__all__ = ["Other", "Pair", "PairInterpretation", "Weights", "make_pair"]

Other = Model | Mapping[str, Tensor]

LEAVES = (ops.coordinate, ops.coefficient)


@dataclass(frozen=True)
class Weights:
    """Absolute values at one leaf: theta, theta', and m, the smaller one where the signs agree.

    Attributes:
        first: ``|theta|``.
        second: ``|theta'|``; the same object as ``first`` where nothing differs.
        common: ``|m|``: min(|theta|, |theta'|) where theta * theta' >= 0, else 0.
        excess: ``|theta| - |m|``, formed entry by entry; ``None`` if it is zero everywhere.
        other_excess: ``|theta'| - |m|``, likewise.
        signs_agree: whether theta * theta' >= 0 everywhere.
    """

    first: Tensor
    second: Tensor
    common: Tensor
    excess: Tensor | None = None
    other_excess: Tensor | None = None
    signs_agree: bool = True

    @classmethod
    def equal(cls, value: Tensor) -> Weights:
        """The same absolute values on both sides."""
        return cls(value, value, value)

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Weights:
        """Compare two arrays of effective parameters."""
        if first is second or torch.equal(first, second):
            return cls.equal(first.abs())
        opposite = ~agreement(first, second)
        a, b = first.abs(), second.abs()
        common = torch.minimum(a, b)
        agree = not bool(opposite.any())
        if not agree:
            common.masked_fill_(opposite, 0.0)
        return cls(a, b, common, _excess(a, common), _excess(b, common), agree)

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Apply a linear map with non-negative coefficients to every part."""
        done: dict[int, Tensor] = {}

        def once(value: Tensor) -> Tensor:
            if id(value) not in done:
                done[id(value)] = function(value)
            return done[id(value)]

        return Weights(
            once(self.first),
            once(self.second),
            once(self.common),
            None if self.excess is None else once(self.excess),
            None if self.other_excess is None else once(self.other_excess),
            self.signs_agree,
        )


def _excess(value: Tensor, common: Tensor) -> Tensor | None:
    excess = value - common
    return excess if bool(excess.any()) else None


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Where theta * theta' >= 0, without forming a product that could underflow."""
    return ~(((first > 0) & (second < 0)) | ((first < 0) & (second > 0)))


@dataclass(frozen=True)
class Side:
    """One of the two networks: as captured, its lifted graph, its tensors, and leaves in order."""

    captured: Captured
    module: fx.GraphModule
    tensors: Mapping[str, Tensor]
    nodes: list[fx.Node]

    def value(self, leaf: int) -> Tensor:
        """The numbers that a leaf reads, with their signs, in float64."""
        node = self.nodes[leaf]
        value = self._evaluate(node).detach().to(torch.float64)
        # The sum is finite where all entries are, and needs no memory; it may overflow otherwise.
        if not bool(value.sum().isfinite()) and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{self._name(node)}: the effective value is NaN or infinite: look for a running "
                "variance below 0 or a division by 0"
            )
        return value

    def raw(self, leaf: int) -> Tensor | None:
        """The model's own tensor, where a leaf reads one as it is."""
        read = arguments(self.nodes[leaf])[0]
        return self.tensors[str(read.target)] if read.op == "placeholder" else None

    @staticmethod
    def _name(node: fx.Node) -> str:
        return str(arguments(node)[1]) if node.target is ops.coordinate else node.name

    def _evaluate(self, node: fx.Node) -> Any:
        if node.target in LEAVES:
            return self._evaluate(arguments(node)[0])
        if node.op == "placeholder":
            return self.tensors[str(node.target)].detach()
        if node.op == "get_attr":
            buffer: Tensor = getattr(self.module, str(node.target))
            device = next((t.device for t in self.tensors.values()), buffer.device)
            return buffer.to(device)
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._evaluate)
        if node.target is ops.folded_weight:
            return in_double(*args)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def in_double(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """A folded weight, formed in float64."""
    return ops.folded_weight(weight.to(torch.float64), factor, axis, groups)


@dataclass
class Pair:
    """Two sets of weights for one lifted graph.

    Attributes:
        lifted: its lifted graph at full resolution; leaves are numbered in ``meta["leaf"]``, and
            the slopes of a ``ops.slope`` node count as one.
        ours: the first network.
        theirs: the second one; its leaves correspond to those of the first.
        architecture: what differs although it is no part of theta, by name: slopes, clamp bounds,
            fixed coefficients.
    """

    lifted: fx.GraphModule
    ours: Side
    theirs: Side
    architecture: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for leaf, node in enumerate(self.ours.nodes):
            if node.meta["fixed"] and not torch.equal(
                self.ours.value(leaf), self.theirs.value(leaf)
            ):
                self.architecture += [n for n in self.names(node) if n not in self.architecture]

    def names(self, leaf: fx.Node) -> list[str]:
        """Names of the tensors that a leaf is computed from, or of the operation of a literal."""
        found: list[str] = []
        stack, seen = [leaf], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                found.append(self.ours.captured.tensors[str(node.target)])
            stack += node.all_input_nodes
        origin = leaf.meta.get("origin")
        return sorted(found) or [f"a number in {module_path(origin) if origin else leaf.name}"]

    def coordinates(self) -> list[tuple[int, str]]:
        """Leaves that are part of theta, with the names of their coordinates."""
        return [
            (leaf, str(arguments(node)[1]))
            for leaf, node in enumerate(self.ours.nodes)
            if node.target is ops.coordinate
        ]

    def values(self, leaf: int) -> tuple[Tensor, Tensor]:
        """Effective parameters of both networks at a leaf, float64; one object if equal."""
        first = self.ours.value(leaf)
        raw = self.ours.raw(leaf), self.theirs.raw(leaf)
        if raw[0] is not None and raw[1] is not None and torch.equal(raw[0], raw[1]):
            return first, first
        return first, self.theirs.value(leaf)


class PairInterpretation(Interpretation):
    """An interpretation of a lifted graph (or of its reduction) for a pair of networks."""

    def __init__(self, module: fx.GraphModule, pair: Pair) -> None:
        """See :class:`~fxpath.interpret.Interpretation`; numbers are float64."""
        super().__init__(module, torch.float64)
        self.pair = pair

    def outcome(self) -> Any:
        """What the graph's last operation returns."""
        with torch.no_grad():
            return self.run(self.pair.ours.tensors)

    def folded_weight(self, weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
        # Evaluated for each network where it is read, see Side.
        return weight

    def other(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """Values of both networks at a leaf."""
        return self.pair.values(node.meta["leaf"])


# -- making a pair ---------------------------------------------------------------------------------


def make_pair(
    model: Model,
    other: Other,
    input_shape: Any = None,
    example_inputs: Any = None,
    until: str | None = None,
) -> Pair:
    """Capture ``model`` and hold ``other`` against it.

    Args:
        model: as for :func:`fxpath.analyze`.
        other: a model of the same architecture, or a state dict with the model's own names.  A
            model may hold its weights in another way (pruned, parametrized, batch norms fused): its
            effective parameters count.
        input_shape: as for :func:`fxpath.analyze`.
        example_inputs: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.

    Raises:
        TypeError: if ``other`` is neither.
        ValueError: for another architecture, missing or unknown keys, other shapes, NaN.
        UnsupportedModelError: as :func:`fxpath.analyze`.
    """
    ours = build(model, input_shape, example_inputs, until=until, reduced=False)
    tensors = _detached(ours.captured.live())
    mark_static(ours.lifted.graph)
    leaves = _number_leaves(ours.lifted.graph)
    mine = Side(ours.captured, ours.lifted, tensors, leaves)
    if isinstance(other, (nn.Module, ExportedProgram)):
        theirs = build(other, input_shape, example_inputs, until=until, reduced=False)
        mark_static(theirs.lifted.graph)
        _check_other(theirs.captured.tensors, theirs.captured.live())
        same = _match(ours.lifted, theirs.lifted)
        matched = [same.get(leaf, leaf) for leaf in leaves]
        live = _detached(theirs.captured.live())
        side = Side(theirs.captured, theirs.lifted, live, matched)
    elif isinstance(other, Mapping):
        state = _from_state(ours.captured, ours.lifted, other)
        side = Side(ours.captured, ours.lifted, state, leaves)
    else:
        raise TypeError(
            f"other is a {type(other).__name__}: pass a model of the same architecture, or a state "
            "dict with the model's own names"
        )
    return Pair(ours.lifted, mine, side)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _number_leaves(graph: fx.Graph) -> list[fx.Node]:
    """Leaves in order; what a slope reads is one, too."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        leaf = node
        if node.target is ops.slope and isinstance(arguments(node)[1], fx.Node):
            leaf = arguments(node)[1]
        elif node.target not in LEAVES:
            continue
        if "leaf" not in leaf.meta:
            leaf.meta["leaf"] = len(found)
            leaf.meta["fixed"] = leaf.target is not ops.coordinate
            found.append(leaf)
    return found


def _check_other(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    try:
        check_finite({names[key]: tensor for key, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"other: {error}") from None


def _from_state(
    captured: Captured, lifted: fx.GraphModule, state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a state dict for the placeholders of a captured model."""
    own = named_tensors(captured.source)
    aliases: dict[int, list[str]] = {}
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    unknown = sorted(set(state) - set(own) - set(_stored(captured.source)))
    read = {
        node.name: captured.tensors[node.name]
        for node in captured.graph_module.graph.nodes
        if node.op == "placeholder" and node.users and node.name in captured.tensors
    }
    tensors = dict(captured.live())
    missing, shapes = [], []
    for placeholder, name in read.items():
        if name in captured.constants:
            continue
        same = [a for a in aliases[id(own[name])] if a in state]
        if not same:
            # A buffer that no state dict holds is taken as it is in the model.
            if name in _stored(captured.source):
                missing.append(name)
            continue
        value = state[same[0]]
        if any(not torch.equal(value, state[a]) for a in same[1:]):
            raise ValueError(
                f"other: {', '.join(same)} are one tensor in the model, but differ in the state "
                "dict: it belongs to another architecture"
            )
        if tuple(value.shape) != tuple(own[name].shape):
            shapes.append(f"{name} {tuple(value.shape)}, in the model {tuple(own[name].shape)}")
        tensors[placeholder] = value
    problems = [
        f"{what}: {', '.join(found)}"
        for what, found in (("missing", missing), ("unknown", unknown), ("other shapes", shapes))
        if found
    ]
    if problems:
        raise ValueError(
            f"other: this state dict is not one of the model ({'; '.join(problems)}); if its "
            "weights are held in another way (pruned, parametrized), pass the model itself"
        )
    _check_other(read, {key: tensors[key] for key in read})
    _check_baked(lifted, read, captured.live(), tensors)
    device = {key: value.device for key, value in captured.live().items()}
    return {key: value.detach().to(device[key]) for key, value in tensors.items()}


def _stored(model: Model) -> set[str]:
    """Names that the model's own state dict has."""
    return set(model.state_dict) if isinstance(model, ExportedProgram) else set(model.state_dict())


def _check_baked(
    lifted: fx.GraphModule,
    read: Mapping[str, str],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> None:
    """Refuse other masks and index lists: the lifted graph was made for the model's own."""
    live = {n.target for n in lifted.graph.nodes if n.op == "placeholder" and n.users}
    changed = [
        name
        for key, name in read.items()
        if key not in live and not torch.equal(ours[key], theirs[key].to(ours[key].device))
    ]
    if changed:
        raise ValueError(
            f"other: {', '.join(changed)} select entries of activations, and differ from the "
            "model's: this is another architecture"
        )


# -- two graphs ------------------------------------------------------------------------------------


def _match(first: fx.GraphModule, second: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Pairs of corresponding nodes of two lifted graphs.

    Raises:
        ValueError: naming the first operation in which they differ.
    """
    ours, theirs = (
        [n for n in module.graph.nodes if n.op == "call_function" and not static(n)]
        for module in (first, second)
    )
    same: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours, theirs, strict=False):
        if a.target is not b.target or not _alike((first, a.args), (second, b.args), same):
            raise ValueError(
                f"other is of another architecture: {_described(a)} in the model is "
                f"{_described(b)} there"
            )
        same[a] = b
    if len(ours) != len(theirs):
        longer = ours if len(ours) > len(theirs) else theirs
        raise ValueError(
            "other is of another architecture: one of the two goes on with "
            f"{_described(longer[min(len(ours), len(theirs))])}"
        )
    return same


def _described(node: fx.Node) -> str:
    origin = node.meta.get("origin")
    shape = "x".join(map(str, node.meta["val"].shape))
    if origin is None:
        return f"an input or output ({shape})"
    literals = [str(a) for a in origin.args if not isinstance(a, fx.Node) and a is not None]
    called = f"{origin.target}({', '.join(literals)})" if literals else str(origin.target)
    return f"{called} of {module_path(origin) or origin.name} ({shape})"


def _alike(
    ours: tuple[fx.GraphModule, Any], theirs: tuple[fx.GraphModule, Any], same: dict[Any, Any]
) -> bool:
    (first, a), (second, b) = ours, theirs
    if isinstance(a, (list, tuple)):
        return (
            isinstance(b, (list, tuple))
            and len(a) == len(b)
            and all(_alike((first, x), (second, y), same) for x, y in zip(a, b, strict=True))
        )
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b)
    if a in same or not static(a):
        return same.get(a) is b
    if a.op == "get_attr" and b.op == "get_attr":
        one, two = getattr(first, str(a.target)), getattr(second, str(b.target))
        return one.shape == two.shape and torch.equal(one, two)
    if "leaf" in a.meta:
        if a.target in LEAVES and a.target is not b.target:
            return False
        if tuple(a.meta["val"].shape) != tuple(b.meta["val"].shape):
            return False
    elif a.target is not b.target or not _alike((first, a.args), (second, b.args), same):
        return False
    same[a] = b
    return True
