"""Pass: frozen batch norms become part of the maps before them, or affine steps of their own.

A norm that alone reads a convolution or a linear map is folded into it; operations in between that
are identities in eval mode (dropout, clone) do not count.  Such a map has the effective weight
gamma W / sigma and the effective bias beta + gamma (b - mu) / sigma, computed per use, so that a
weight with two batch norms has two effective values.  A norm elsewhere is an identity neuron of its
own: a product with gamma / sigma, and the bias beta - gamma mu / sigma.

Requires a functional ATen graph.  Ensures that no frozen batch norm is left, but one whose
statistics are read or whose parameters are activations, and that every extent that is known is a
number.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpath.graph import aten, ops
from fxpath.graph.constants import active_nodes
from fxpath.graph.edit import drop_dead, written
from fxpath.graph.naming import coordinate_name, name_without_parameter
from fxpath.graph.schema import arguments, bind
from fxpath.graph.values import frozen, settled
from fxpath.model import Captured
from fxpath.passes.setting import Setting


def fold(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Rewrite every frozen batch norm; what a node stands for is noted as its ``origin``."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copied))
    for node, copy in copied.items():
        copy.meta["origin"] = node
        copy.meta["val"] = fx.node.map_aggregate(copy.meta.get("val"), settled)
    active = active_nodes(graph, setting.captured)
    for node in list(graph.nodes):
        if node.target in aten.BATCH_NORMS and frozen(node) and _alone(node, active):
            source = _producer(bind(node)["input"])
            if source is not None and _foldable(source, active):
                _fold(setting.captured, source, node)
            else:
                _write_out(setting.captured, node)
    drop_dead(graph)
    return written(module, graph)


def _alone(norm: fx.Node, active: set[fx.Node]) -> bool:
    """Whether a norm reads no activation but its input, and gives nothing but that normalized."""
    bound = bind(norm)
    read = [bound[key] for key in ("weight", "bias", "running_mean", "running_var")]
    items = norm.target in aten.WITH_STATISTICS
    return not any(value in active for value in read) and not (
        items and any(arguments(user)[1] != 0 for user in norm.users)
    )


def _producer(value: Any) -> fx.Node | None:
    """What a batch norm reads, through identities, if nothing else reads any of it."""
    while isinstance(value, fx.Node) and len(value.users) == 1:
        if not _transparent(value):
            return value
        value = value.args[0]
    return None


def _transparent(node: fx.Node) -> bool:
    """Whether an operation hands on its argument as it is, channel axis included."""
    if node.target in aten.DROPOUTS:
        bound = bind(node)
        return not bound["train"] or bound["p"] == 0
    if node.target not in {*aten.SAME, *aten.CASTS, *aten.RESHAPES}:
        return False
    before, after = arguments(node)[0].meta["val"], node.meta["val"]
    return before.shape == after.shape and bool(after.is_floating_point())


def _foldable(node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether channels, which batch norm has on axis 1, are the output axis of the map."""
    if node.target not in {*aten.CONVOLUTIONS, *aten.TRANSPOSED, aten.LINEAR}:
        return False
    bound = bind(node)
    weight = bound["weight"]
    if "val" not in weight.meta or weight in active or bound["bias"] in active:
        return False
    dims = node.meta["val"].dim()
    if node.target is aten.LINEAR and weight.meta["val"].dim() != 2:
        return False
    return dims == (2 if node.target is aten.LINEAR else weight.meta["val"].dim())


def _fold(captured: Captured, node: fx.Node, norm: fx.Node) -> None:
    graph = node.graph
    bound = bind(node)
    weight = bound["weight"]
    transposed = node.target in aten.TRANSPOSED or bool(bound.get("transposed"))
    factor, bias = _effective(captured, norm, bound["bias"])
    with graph.inserting_before(norm):
        folded = graph.call_function(
            ops.folded_weight, (weight, factor, int(transposed), bound.get("groups", 1))
        )
    folded.meta["val"] = weight.meta["val"].double()
    folded.meta["coordinate"] = coordinate_name(
        captured, weight, node, "weight"
    ) or name_without_parameter(captured, node, "weight", weight)
    node.args = (bound["input"], folded, bias, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    if node.target is aten.CONVOLUTION and len(node.args) < 3:
        raise AssertionError("aten.convolution takes its arguments by position")
    norm.prepend(node)  # behind what its weights are computed from
    _replace(norm, node)


def _write_out(captured: Captured, norm: fx.Node) -> None:
    """A norm as the product and the sum that it is."""
    graph, x = norm.graph, bind(norm)["input"]
    shape = [1] * x.meta["val"].dim()
    shape[1] = -1
    step = x
    for function, weight in zip(
        (aten.MULTIPLY, aten.ADD), _effective(captured, norm, None), strict=True
    ):
        with graph.inserting_before(norm):
            beside = graph.call_function(aten.RESHAPE, (weight, shape))
            step = graph.call_function(function, (step, beside))
        beside.meta["val"] = weight.meta["val"].reshape(shape)
        step.meta = {**norm.meta, "val": x.meta["val"]}
    _replace(norm, step)


def _replace(norm: fx.Node, step: fx.Node) -> None:
    """Let a norm's readers read its result: the node itself, or item 0 of a native batch norm."""
    for result in list(norm.users) if norm.target in aten.WITH_STATISTICS else [norm]:
        result.replace_all_uses_with(step)


def _effective(captured: Captured, norm: fx.Node, bias: Any) -> tuple[fx.Node, fx.Node]:
    """Nodes for gamma / sigma and beta + gamma (bias - mu) / sigma of a frozen batch norm."""
    graph, stats = norm.graph, bind(norm)
    with graph.inserting_before(norm):
        factor = graph.call_function(
            ops.normalizer, (stats["weight"], stats["running_var"], stats["eps"])
        )
        shift = graph.call_function(
            ops.folded_bias, (bias, factor, stats["bias"], stats["running_mean"])
        )
    named = ((factor, "weight", stats["running_var"]), (shift, "bias", stats["running_mean"]))
    for node, suffix, statistic in named:
        node.meta["val"] = stats["running_var"].meta["val"].double()
        node.meta["coordinate"] = coordinate_name(
            captured, stats[suffix], norm, suffix
        ) or name_without_parameter(captured, norm, suffix, statistic)
    return factor, shift
