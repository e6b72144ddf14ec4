"""Runs of a derived graph on sharded parameters: gathered where they are read, dropped behind it.

What the graph computes from the model's tensors alone (``|W|``, folded and masked weights) is not
kept: it is computed anew for each step that reads it, so that activations and the few tensors of
one step are all that a rank holds beside its own parts.  The numbers are those of a run on whole
tensors: the steps are the same, in the same order.

Every rank runs the same steps, and comes to each gathering in the same order.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxpath.graph import ops, products, scaling
from fxpath.graph.edit import inputs_first
from fxpath.graph.schema import arguments, target
from fxpath.graph.static import evaluated
from fxpath.sharding import any_sharded, is_sharded, write_whole

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: Steps for which a tensor is kept that one of them reads again; a layer has no more.
NEAR = 16

#: Steps that read what is computed from the model's tensors, and make a few numbers of it.
_NUMBERS = (products.high, products.low, scaling.kept)


class Streamed:
    """A derived graph in the form of :func:`fxpath.passes.place.stream`."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._static = set(_static(module.graph))
        #: The steps in order; of each value, in which of them it is read.
        self._steps: list[fx.Node] = []
        self._reads: dict[fx.Node, list[int]] = {}
        for node in module.graph.nodes:
            if node.op == "call_function" and node not in self._static:
                for value in node.all_input_nodes:
                    self._reads.setdefault(value, []).append(len(self._steps))
                self._steps.append(node)

    def __call__(self, tensors: Mapping[str, Tensor], out: Sequence[Tensor]) -> dict[str, Any]:
        """Run it on the model's tensors by placeholder, sharded or not.

        Args:
            tensors: the model's tensors.
            out: memory for the scores, in their order, as it is spread over the ranks; of each,
                this rank's part is written.

        Returns:
            What the graph returns, without the scores.
        """
        results: dict[str, Any] = dict(arguments(_output(self.module.graph))[0])
        outs = dict(zip(results.pop("scores", {}).values(), out, strict=True))
        device = next((tensor.device for tensor in tensors.values()), None)
        wanted = set[fx.Node]()
        fx.map_arg(results, wanted.add)
        known: dict[fx.Node, Any] = {
            node: self.module.get_buffer(str(node.target)).to(device)
            for node in self.module.graph.nodes
            if node.op == "get_attr"
        }
        held: dict[fx.Node, Tensor] = {}
        for i, node in enumerate(self._steps):
            read = [n for n in node.all_input_nodes if n in self._static]
            missing = [n for n in read if n not in held]
            held.update(evaluated(self.module, tensors, missing) if missing else ())
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: held[n] if n in self._static else known[n]
            )
            known[node] = target(node)(*args, **kwargs)
            del args, kwargs
            for value in [n for n in held if not self._near(n, i)]:
                del held[value]
            for value in (node, *node.all_input_nodes):
                if value in known and value.op != "get_attr" and not self._later(value, i):
                    if value in outs:
                        write_whole(outs.pop(value), known[value])
                    if value not in wanted:
                        del known[value]
        for value, memory in outs.items():
            # Zeros, of what no path reaches.
            ((_, found),) = evaluated(self.module, tensors, [value])
            write_whole(memory, found)
        numbers: dict[str, Any] = fx.map_arg(results, known.__getitem__)
        return numbers

    def _later(self, value: fx.Node, step: int) -> bool:
        reads = self._reads.get(value, ())
        return any(read > step for read in reads[-1:])

    def _near(self, value: fx.Node, step: int) -> bool:
        """Whether a value is read again soon."""
        reads = self._reads[value]
        place = bisect.bisect_right(reads, step)
        return place < len(reads) and reads[place] <= step + NEAR


def spreads(
    module: fx.GraphModule, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, DTensor]:
    """Over which ranks scores are spread.

    Args:
        module: a lifted graph.
        tensors: the model's tensors by placeholder.
        names: their names in the model.

    Returns:
        Score -> its parameter, if that is sharded; of a score without a parameter of its own, a
        sharded tensor that it is computed from, one of its shape if there is any.
    """
    if not any_sharded(tensors.values()):
        return {}
    keys = {name: key for key, name in names.items()}
    found: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        if node.target is not ops.coordinate or arguments(node)[1] in found:
            continue
        name, shape = str(arguments(node)[1]), tuple(node.meta["val"].shape)
        read = [str(n.target) for n in inputs_first(node, ()) if n.op == "placeholder"]
        sharded = [tensors[key] for key in read if is_sharded(tensors[key])]
        sharded.sort(key=lambda tensor: tuple(tensor.shape) != shape)
        own = [tensors[keys[name]]] if name in keys else []
        found.update((name, tensor) for tensor in [*own, *sharded][:1])
    return {name: tensor for name, tensor in found.items() if is_sharded(tensor)}


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def _static(graph: fx.Graph) -> Iterator[fx.Node]:
    """What is computed from the model's tensors alone."""
    known = set[fx.Node]()
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        made = node.op == "call_function" and node.target not in _NUMBERS
        if node.op == "placeholder" or made and inputs and known.issuperset(inputs):
            known.add(node)
            yield node
