"""Values that a lifted graph computes from the model's tensors alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from fxpath.graph.edit import inputs_first
from fxpath.graph.leaves import LEAVES
from fxpath.graph.schema import arguments, target
from fxpath.sharding import whole


def evaluated(
    module: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    wanted: Sequence[fx.Node],
    attached: bool = False,
) -> Iterator[tuple[fx.Node, Any]]:
    """Evaluate some nodes; each step is done once, and nothing is held longer than it is needed.

    Args:
        module: a lifted graph.
        tensors: the model's tensors by the names of the graph's placeholders.
        wanted: of its nodes; of an effective parameter what it reads, with signs.
        attached: whether to record what autograd needs.
    """
    needed: dict[fx.Node, None] = {}
    for node in wanted:
        needed.update(dict.fromkeys(inputs_first(node, needed)))
    asked, last = set(wanted), {value: node for node in needed for value in node.all_input_nodes}
    device = next((t.device for t in tensors.values()), None)
    known: dict[fx.Node, Any] = {}
    for node in needed:
        if node.op == "placeholder":
            given = tensors[str(node.target)]
            # One that is sharded is gathered here, and dropped as soon as what reads it is known.
            known[node] = whole(given.detach() if given.requires_grad and not attached else given)
        elif node.op == "get_attr":
            known[node] = module.get_buffer(str(node.target)).to(device)
        elif node.target in LEAVES:
            known[node] = known[arguments(node)[0]]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = target(node)(*args, **kwargs)
        if node in asked:
            yield node, known[node]
        for value in (node, *node.all_input_nodes):
            if last.get(value, node) is node:
                del known[value]
