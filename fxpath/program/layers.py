"""Which operations of a lifted graph are layers, and what their neurons are."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.equations import letters
from fxpath.graph.links import on_paths
from fxpath.graph.schema import arguments, bias_of, target
from fxpath.private import schema
from fxpath.sharding import whole

Channels = Callable[[Tensor], Tensor]

WEIGHING = {ops.conv, ops.contract, ops.scale}


@dataclass(frozen=True)
class Layer:
    """Weights and biases that one operation of the model reads.

    Attributes:
        name: qualified name of the module, or of the parameter itself where no module is named so,
            or where the module is named by an operation before it.
        operation: ATen operation, e.g. ``conv2d``.
        weight: name of its weight coordinates, ``None`` for an operation that only adds a bias.
        bias: name of its bias coordinates, if it has any.
        shape: shape of the weight (or bias) coordinates.
        prunable: whether pruning ranks its weights: those of convolutions and linear maps.
    """

    name: str
    operation: str
    weight: str | None
    bias: str | None
    shape: tuple[int, ...]
    prunable: bool


def neuron_shares(layer: Layer, channels: Channels, shares: Mapping[str, Tensor]) -> Tensor:
    """Share of path mass through each output channel of a layer: incoming weights and bias.

    Args:
        layer: the layer.
        channels: sums of a weight-shaped tensor over all but its output channels.
        shares: shares by parameter name.
    """
    if layer.weight is None:
        assert layer.bias is not None
        return whole(shares[layer.bias]).flatten()
    mass = channels(whole(shares[layer.weight]))
    if layer.bias is not None and shares[layer.bias].numel() == mass.numel():
        mass = mass + whole(shares[layer.bias]).flatten()
    return mass


def find_layers(module: fx.GraphModule) -> dict[Layer, Channels]:
    """Layers of a lifted graph in order of execution; all coordinates are in one layer each.

    An operation whose weight another one has had before it (a module that is called twice, a tied
    weight) is a layer only if it has a bias of its own, and of that bias alone.

    Returns:
        Layer -> function that sums a weight-shaped tensor over all but its output channels.
    """
    found = dict.fromkeys(layers_at(module).values())
    return {layer: _channels(module, weigh) if weigh else _flatten for layer, weigh in found}


def layers_at(module: fx.GraphModule) -> dict[fx.Node, tuple[Layer, fx.Node | None]]:
    """Captured operation -> the layer that it is, and the lifted node that weighs, if one does.

    Where its weight belongs to an operation before it, and a bias is its own, that bias's layer.
    """
    weights: dict[fx.Node | None, fx.Node] = {}
    biases: dict[fx.Node | None, fx.Node] = {}
    counted = on_paths(module.graph)
    for node in (n for n in module.graph.nodes if n in counted):
        origin = node.meta.get("origin")
        if node.target in WEIGHING and coordinate_of(arguments(node)[1]) is not None:
            weights.setdefault(origin, node)
        bias = None if node.target is ops.constant else bias_of(node)
        coordinate = coordinate_of(bias)
        if bias is not None and coordinate is not None:
            # What adds it may be another operation than the one that weighs.
            biases.setdefault(bias.meta["origin"], coordinate)
    found: dict[fx.Node, tuple[Layer, fx.Node | None]] = {}
    owners: dict[str, tuple[Layer, fx.Node | None]] = {}
    names: set[str] = set()
    for origin in dict.fromkeys([n.meta.get("origin") for n in module.graph.nodes if n in counted]):
        if origin is None or not (origin in weights or origin in biases):
            continue
        weigh, bias = weights.get(origin), biases.get(origin)
        own = [None if node is None else _name(node) for node in (weigh and _weight(weigh), bias)]
        fresh = [name for name in own if name is not None and name not in owners]
        if fresh:
            weigh = weigh if own[0] in fresh else None
            layer = _layer(origin, weigh, bias if own[1] in fresh else None, names)
            names.add(layer.name)
            owners.update(dict.fromkeys(fresh, (layer, weigh)))
        found[origin] = owners[fresh[0] if fresh else next(name for name in own if name)]
    return found


def _name(coordinate: fx.Node) -> str:
    return str(arguments(coordinate)[1])


def _weight(weigh: fx.Node) -> fx.Node:
    found = coordinate_of(arguments(weigh)[1])
    assert found is not None
    return found


def _layer(
    origin: fx.Node, weigh: fx.Node | None, bias: fx.Node | None, taken: Container[str]
) -> Layer:
    weight = None if weigh is None else _weight(weigh)
    main = weight or bias
    assert main is not None
    name = _name(main)
    short = name.removesuffix(".weight").removesuffix(".bias")
    operation = schema(target(origin)).name.split("::")[1]
    return Layer(
        name=name if short in taken else short,
        operation=operation.removeprefix("_native_").removesuffix("_legit_no_training"),
        weight=None if weight is None else name,
        bias=None if bias is None else _name(bias),
        shape=tuple(main.meta["val"].shape),
        prunable=weigh is not None and weigh.target in (ops.conv, ops.contract),
    )


def coordinate_of(weight: object) -> fx.Node | None:
    """The coordinates behind a weight, through operations that only relabel entries."""
    while isinstance(weight, fx.Node) and weight.op == "call_function":
        if weight.target is ops.coordinate:
            return weight
        weight = arguments(weight)[0]
    return None


def _relabel(module: fx.GraphModule, weight: fx.Node, value: Tensor) -> Tensor:
    """Show coordinates as the operation sees them."""
    if weight.target is ops.coordinate:
        return value
    inner = _relabel(module, arguments(weight)[0], value)
    if weight.target is ops.scale:
        return inner

    def held(node: fx.Node) -> Tensor:
        return module.get_buffer(str(node.target)).to(value.device)

    rest: Any = fx.map_arg(arguments(weight)[1:], held)
    shown: Tensor = target(weight)(inner, *rest)
    return shown


def _flatten(value: Tensor) -> Tensor:
    return value.flatten()


def _channels(module: fx.GraphModule, node: fx.Node) -> Channels:
    """Sum over all axes of a weight but those of its output channels."""
    weight = arguments(node)[1]
    assert isinstance(weight, fx.Node)

    def channels(value: Tensor) -> Tensor:
        seen = _relabel(module, weight, value)
        if node.target is ops.conv and arguments(node)[6]:
            # [in, out / groups, ...]: the output channels of each group lie on axis 1.
            groups = int(arguments(node)[8])
            blocks = seen.reshape(groups, -1, *seen.shape[1:])
            return blocks.sum((1, *range(3, blocks.dim()))).flatten()
        if node.target is ops.conv:
            return seen.flatten(1).sum(1)
        if node.target is ops.contract:
            form = letters(arguments(node)[3])
            kept = "".join(c for c in form.weight if c in form.out)
            # What the input has as well are places (a batch), unless there is nothing else.
            kept = "".join(c for c in kept if c not in form.x) or kept
            return torch.einsum(f"{form.weight}->{kept}", seen).flatten()
        return seen.flatten()

    return channels
