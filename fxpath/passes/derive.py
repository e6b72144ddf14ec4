"""Pass: append the reverse half, so that one flat graph computes the norm and every score.

Requires a lowered graph.  Ensures a graph with the same placeholders and one output, a dictionary:

- ``mantissa``, ``exponent``: ``||Phi||_q^q = mantissa * 2 ** exponent``, float64;
- ``smallest``, or with the reverse half ``mass``, which always decides: the witnesses of range of
  :mod:`fxpath.graph.scaling`, float64;
- ``scores``: name -> share of path mass (14) of every coordinate; in the same order ``lows``, the
  smallest of each, row by row, and ``highs``, the largest entries of what is lifted; or
  ``gradients``: those of ``log ||Phi||_q^q`` with respect to each of :func:`leaves`, lifted.

It calls plain functions over ATen, of :mod:`fxpath.graph.scaling`, ``products``, ``shapes`` and
``ops``: no step has a side effect or reads a number on the host, and all tensors are on the device
of the model's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxpath.graph import ops, products, scaling
from fxpath.graph.edit import drop_dead, written
from fxpath.graph.leaves import LEAVES
from fxpath.graph.links import extents
from fxpath.graph.schema import arguments, target
from fxpath.passes.setting import Setting
from fxpath.passes.tape import Factored, Fixed, Outer, Tape, Unsettled, Value
from fxpath.passes.words import WORDS

#: How a derived graph ends: without a reverse half, with shares, or with gradients.
Ending = Literal["norm", "scores", "gradients"]


def derive(
    module: fx.GraphModule,
    setting: Setting,
    dtype: torch.dtype,
    ending: Ending = "scores",
    raised: int = 0,
) -> fx.GraphModule:
    """Append the reverse half to a lowered graph; ``module`` itself is not changed.

    Args:
        module: a lowered graph.
        setting: whose network it is.
        dtype: number format of the steps.
        ending: what is asked for besides the norm.
        raised: shares and gradients are multiplied by ``2 ** raised``: those that would be below
            the number format are within it, and those of other entries beyond.
    """
    tape = Tape(dtype, setting.device, setting.q, ending == "norm", raised, setting.effective)
    return _Derivation(module, tape, ending).run()


#: A leaf: the node that reads it, what is lifted, and how.
Leaf = tuple[fx.Node, fx.Node, Callable[[Tensor, torch.dtype, float], Tensor]]


def leaves(module: fx.GraphModule) -> list[Leaf]:
    """All that ``||Phi||`` depends on, in a lowered graph: coordinates, and numbers beside them."""
    found: list[Leaf] = []
    for node in module.graph.nodes:
        if node.target is ops.slope and isinstance(node.args[1], fx.Node):
            found.append((node, node.args[1], products.steepness))
        elif node.target in LEAVES:
            found.append((node, arguments(node)[0], products.lift))
    return [leaf for leaf in found if leaf[1].op != "get_attr"]


class _Derivation:
    def __init__(self, module: fx.GraphModule, tape: Tape, ending: Ending) -> None:
        self.module, self.tape, self.ending = module, tape, ending
        self.env: dict[fx.Node, Any] = {}
        self.leaves: list[Value] = []
        self.first: dict[str, Value] = {}
        self.scores: dict[str, fx.Node | None] = {}
        self.lows: dict[str, fx.Node] = {}
        self.highs: dict[str, list[fx.Node]] = {}
        self.gradients: dict[Value, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.tape.graph.output(self.env[arguments(node)[0]])
            else:
                self.env[node] = self._step(node)
        drop_dead(self.tape.graph)
        return written(self.tape.root, self.tape.graph)

    def _step(self, node: fx.Node) -> Any:
        tape = self.tape
        if node.op == "placeholder":
            return tape.graph.placeholder(str(node.target))
        if node.op == "get_attr":
            return tape.hold(self.module.get_buffer(str(node.target)), str(node.target))
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        if node.target is ops.coordinate:
            return self._coordinate(node, *args)
        if node.target is ops.coefficient:
            return self._architecture(node, args[0], products.lift)
        if node.target is ops.total:
            return self._total(*args)
        if node.target is ops.slope and isinstance(arguments(node)[1], fx.Node):
            args = args[0], self._architecture(arguments(node)[1], args[1], products.steepness)
        lifted = any(
            isinstance(self.env[n], Value | Factored | Unsettled) for n in node.all_input_nodes
        )
        if lifted or node.target is ops.source:
            return WORDS[target(node)](tape, node, *args, **kwargs)
        # What is computed from the model's tensors before they are lifted.
        made = tape.emit(target(node), *args)
        made.kwargs = kwargs
        return made

    def _coordinate(self, node: fx.Node, raw: fx.Node, name: str) -> Value:
        """Entries of theta: a leaf of its own for each use."""
        tape, shape = self.tape, extents(node)
        asked = self.ending != "norm"
        lifted = tape.emit(products.lift, raw, tape.dtype, tape.q)
        lifted.meta["val"] = torch.empty(shape, dtype=tape.dtype, device="meta")
        leaf = Value(lifted, shape, wanted=asked)
        # A weight in float64 may lose digits; what is added loses none.
        read = arguments(node)[0]
        narrowed = read.meta["val"].dtype == torch.float64 != tape.dtype
        converted = narrowed and read.target is not ops.folded_bias
        if converted and tape.watch:
            tape.smallest.append(tape.emit(scaling.kept, raw, tape.dtype))
        if self.ending == "scores":
            # Of what a conversion may have made zeros of, as it was.
            sizes = tape.emit(products.lift, raw, torch.float64, tape.q) if narrowed else lifted
            self.highs.setdefault(name, []).append(tape.emit(products.high, sizes))
        self.leaves.append(leaf)
        self.first.setdefault(name, leaf)
        self.scores.setdefault(name, None)

        def back(grad: fx.Node | Outer) -> None:
            if converted:
                total = (
                    tape.emit(products.outer_sum, grad.grad, grad.columns)
                    if isinstance(grad, Outer)
                    else tape.emit(torch.sum, grad)
                )
                tape.masses.append([total])
            if self.ending == "gradients":
                self.gradients[leaf] = tape.formed(leaf, grad)
                return
            share = (
                tape.emit(products.score, leaf.node, grad.grad, grad.columns)
                if isinstance(grad, Outer)
                else tape.emit(torch.mul, leaf.node, grad)
            )
            other = self.scores[name]
            total = share if other is None else tape.emit(torch.add, share, other)
            self.scores[name] = total
            # Right away, while they are in the cache.
            self.lows[name] = tape.emit(products.low, total)

        if asked:
            tape.backs.append((leaf, back, False))
        return leaf

    def _architecture(self, node: fx.Node, raw: fx.Node | Fixed, lift: Any) -> Value:
        """Numbers of the architecture: leaves too, where gradients are asked for."""
        tape = self.tape
        wanted = self.ending == "gradients" and isinstance(raw, fx.Node)
        made = tape.emit(lift, raw, tape.dtype, tape.q)
        made.meta["val"] = torch.empty(extents(node), dtype=tape.dtype, device="meta")
        leaf = Value(made, extents(node), wanted=wanted)
        if wanted:
            self.leaves.append(leaf)
            tape.backs.append((leaf, lambda grad: self.gradients.update({leaf: grad}), True))
        return leaf

    def _total(self, outputs: list[Value]) -> dict[str, Any]:
        """The sum over all output neurons, and the way back."""
        tape = self.tape
        nodes, scales = [x.node for x in outputs], [x.scale for x in outputs]
        made = tape.emit(scaling.sum_up, nodes, scales, tape.zeros)
        mantissa, exponent, shifts = (tape.item(made, i) for i in range(3))
        found: dict[str, Any] = {
            "mantissa": mantissa,
            "exponent": exponent,
        }
        if self.ending == "norm":
            return found | {"smallest": tape.emit(scaling.least, tape.smallest, mantissa)}
        for i, value in enumerate(outputs):
            if value.wanted:
                shift = tape.item(shifts, i)
                each = tape.emit(scaling.seed, mantissa, shift, tape.dtype, tape.raised)
                tape.give(value, tape.emit(scaling.spread, each, value.shape))
        tape.back()
        found["mass"] = tape.emit(scaling.most, tape.masses, mantissa)
        zeros = self._zeros
        if self.ending == "gradients":
            grads = [self.gradients.get(leaf) or zeros(leaf) for leaf in self.leaves]
            return found | {"gradients": grads}
        scores = {n: s or zeros(self.first[n]) for n, s in self.scores.items()}
        lows = [self.lows.get(name) or tape.emit(products.low, s) for name, s in scores.items()]
        highs = [functools.reduce(self._larger, each) for each in self.highs.values()]
        return found | {"scores": scores, "lows": lows, "highs": highs}

    def _larger(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.tape.emit(torch.maximum, a, b)

    def _zeros(self, leaf: Value) -> fx.Node:
        """Of what no path reaches."""
        return self.tape.emit(torch.zeros_like, leaf.node)
