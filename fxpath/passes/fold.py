"""Pass: a frozen batch norm that alone reads a convolution or a linear map is folded into it.

Operations in between that are identities in eval mode (dropout, clone) do not count.

Requires a functional ATen graph.  Ensures that such a map has the effective weight gamma W / sigma
and the effective bias beta + gamma (b - mu) / sigma, computed per use, so that a weight with two
batch norms has two effective values.  Batch norms elsewhere stay: they are identity neurons of
their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.edit import drop_dead
from fxpath.graph.naming import SAME, coordinate_name, name_without_parameter
from fxpath.graph.schema import arguments, bind
from fxpath.model import Captured

__all__ = ["fold_batch_norm", "frozen"]

aten = torch.ops.aten

CONVOLUTIONS = {
    *(getattr(aten, f"conv{n}d").default for n in (1, 2, 3)),
    *(getattr(aten, f"conv{n}d").padding for n in (1, 2, 3)),
    aten.convolution.default,
}
TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
#: Batch norms that return their statistics as well.
WITH_STATISTICS = {aten._native_batch_norm_legit_no_training.default}
#: With frozen statistics an instance norm is the same map.
BATCH_NORMS = {aten.batch_norm.default, aten.instance_norm.default, *WITH_STATISTICS}


def frozen(node: fx.Node) -> bool:
    """Whether a batch norm uses its running statistics."""
    bound = bind(node)
    if bound.get("training", False) or bound.get("use_input_stats", False):
        return False
    return isinstance(bound["running_mean"], fx.Node) and isinstance(bound["running_var"], fx.Node)


def fold_batch_norm(captured: Captured) -> None:
    """Fold in place, in the captured graph (a copy of the model's)."""
    graph = captured.graph_module.graph
    for node in list(graph.nodes):
        if node.target in BATCH_NORMS and frozen(node):
            source = _producer(bind(node)["input"])
            if source is not None and _foldable(source):
                _fold(captured, source, node)
    drop_dead(graph)
    graph.lint()


def _producer(value: Any) -> fx.Node | None:
    """What a batch norm reads, through identities, if nothing else reads any of it."""
    while isinstance(value, fx.Node) and len(value.users) == 1:
        if not _transparent(value):
            return value
        value = value.args[0]
    return None


def _transparent(node: fx.Node) -> bool:
    """Whether an operation hands on its argument as it is, channel axis included."""
    if node.target in DROPOUTS:
        bound = bind(node)
        return not bound["train"] or bound["p"] == 0
    if node.target not in {*SAME, *CASTS, *RESHAPES}:
        return False
    before, after = arguments(node)[0].meta["val"], node.meta["val"]
    return before.shape == after.shape and bool(after.is_floating_point())


def _foldable(node: fx.Node) -> bool:
    """Whether channels, which batch norm has on axis 1, are the output axis of the map."""
    if node.target not in {*CONVOLUTIONS, *TRANSPOSED, aten.linear.default}:
        return False
    weight = bind(node)["weight"]
    if "val" not in weight.meta:
        return False
    dims = node.meta["val"].dim()
    if node.target is aten.linear.default and weight.meta["val"].dim() != 2:
        return False
    return dims == (2 if node.target is aten.linear.default else weight.meta["val"].dim())


def _fold(captured: Captured, node: fx.Node, norm: fx.Node) -> None:
    graph = captured.graph_module.graph
    bound, stats = bind(node), bind(norm)
    weight = bound["weight"]
    transposed = node.target in TRANSPOSED or bool(bound.get("transposed"))
    factor, bias = effective_norm(captured, norm, stats, bound["bias"], before=node)
    with graph.inserting_before(node):
        folded = graph.call_function(
            ops.folded_weight, (weight, factor, int(transposed), bound.get("groups", 1))
        )
    folded.meta["val"] = weight.meta["val"].double()
    folded.meta["coordinate"] = coordinate_name(
        captured, weight, node, "weight"
    ) or name_without_parameter(captured, node, "weight", weight)
    node.args = (bound["input"], folded, bias, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    if node.target is aten.convolution.default and len(node.args) < 3:
        raise AssertionError("aten.convolution takes its arguments by position")
    for user in _results(norm):
        user.replace_all_uses_with(node)


def _results(norm: fx.Node) -> list[fx.Node]:
    """The normalized activation: the node itself, or item 0 of a native batch norm."""
    if norm.target not in WITH_STATISTICS:
        return [norm]
    return [user for user in norm.users if user.args[1] == 0]


def effective_norm(
    captured: Captured, norm: fx.Node, stats: dict[str, Any], bias: Any, before: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Nodes for gamma / sigma and beta + gamma (bias - mu) / sigma of a frozen batch norm."""
    graph = captured.graph_module.graph
    with graph.inserting_before(before):
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
