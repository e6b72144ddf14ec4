"""Pass: let a derived graph run in given memory, where ``|W|`` stands until its scores do.

Requires a derived graph.  Ensures one more placeholder for each score, in their order, into which
it is written.  A weight that one product alone reads is lifted, multiplied and turned into scores
while a block of it is in the cache.  So there is no second copy of any weight, but of one that is
used twice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxpath.graph import products
from fxpath.graph.edit import written
from fxpath.graph.schema import arguments
from fxpath.passes.setting import Setting


def place(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Place a derived graph; ``module`` itself is not changed."""
    return _Placement(module, setting.device).run()


def into(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """The same for compilers: functional steps, but for the last ones, which write the scores."""
    placement = _Placement(module, setting.device)
    for score, out in placement.outs.items():
        placement.copy(score, out)
    return written(module, placement.graph)


def stream(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """The same sweeps in a functional graph, whose results are the scores, without such memory.

    No ``|W|`` is kept between the halves: what is computed from the model's tensors alone can be
    computed anew wherever it is read, from the one tensor that it takes.
    """
    return _Placement(module, setting.device).stream()


class _Placement:
    """Attributes: the new graph; the memory of each score, by the node that computes it."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        self.module, self.device = module, device
        self.graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        made: Any = self.graph.graph_copy(module.graph, copied)
        results: dict[str, Any] = dict(made)
        for old, new in copied.items():
            new.meta.update(old.meta)
        self.output = self.graph.output(results)
        known = [n for n in self.graph.nodes if n.op == "placeholder"]
        # Where placeholders end.
        self.start = known[-1].next if known else next(iter(self.graph.nodes))
        self.outs: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(self.start):
            for i, score in enumerate(results.get("scores", {}).values()):
                self.outs[score] = self.graph.placeholder(f"out_{i}")

    def run(self) -> fx.GraphModule:
        self._sweeps()
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for score, out in self.outs.items():
            if score in order and not self._multiply(score, out, order):
                self.copy(score, out)
        return written(self.module, self.graph)

    def stream(self) -> fx.GraphModule:
        self._sweeps()
        for out in self.outs.values():
            readers = {user.target: user for user in out.users}
            forth, back = (readers.get(step) for step in (products.sweep, products.sweep_back))
            if forth is not None and back is not None:
                raw, columns, q, _ = arguments(forth)
                forth.target, forth.args = products.swept, (raw, columns, q)
                back.target, back.args = products.swept_back, (raw, q, *arguments(back)[1:])
                with self.graph.inserting_after(back):
                    scores = self.graph.call_function(operator.getitem, (back, 2))
                out.replace_all_uses_with(scores)
            self.graph.erase_node(out)
        return written(self.module, self.graph)

    def _sweeps(self) -> None:
        """Weights that are read block by block, with memory for the blocks."""
        with self.graph.inserting_before(self.start):
            memory = self.graph.call_function(products.scratch, (0, torch.float32, self.device))
        for lift in [n for n in self.graph.nodes if n.target is products.lift]:
            if self._sweep(lift, memory):
                shape, dtype = lift.meta["val"].shape, lift.meta["val"].dtype
                size = max(arguments(memory)[0], products.block_size(shape, self.device))
                memory.args = (size, dtype, self.device)
                self.graph.erase_node(lift)
        if not memory.users:
            self.graph.erase_node(memory)

    def copy(self, score: fx.Node, out: fx.Node) -> None:
        """Write a score where it belongs."""
        with self.graph.inserting_after(score):
            kept = self.graph.call_function(products.copy_into, (out, score))
        score.replace_all_uses_with(kept, lambda user: user is self.output)

    def _sweep(self, lift: fx.Node, memory: fx.Node) -> bool:
        """Read a weight block by block, if only one product, its transpose and its score do."""
        readers = {user.target: user for user in lift.users}
        product, back, score = (
            readers.pop(step, None)
            for step in (products.product, products.product_back, products.score)
        )
        high = readers.pop(products.high, None)
        found = [n for n in (product, back, score, high) if n is not None]
        if product is None or readers or len(found) != len(lift.users):
            return False
        if (score is not None) != bool(self.outs) or score is not None and score not in self.outs:
            return False
        raw, _, q = arguments(lift)
        with self.graph.inserting_before(product):
            where = memory if score is None else self.outs[score]
            args: Any = raw, arguments(product)[1], q, where
            swept = self.graph.call_function(products.sweep, args)
            made, most = (self.graph.call_function(operator.getitem, (swept, i)) for i in (0, 1))
        product.replace_all_uses_with(made)
        self.graph.erase_node(product)
        if high is not None:
            high.replace_all_uses_with(most)
            self.graph.erase_node(high)
        if score is not None:
            _, grad, columns = arguments(score)
            with self.graph.inserting_before(back or score):
                args = self.outs[score], grad, columns, memory, back is not None
                swept = self.graph.call_function(products.sweep_back, args)
                gradient, least = (
                    self.graph.call_function(operator.getitem, (swept, i)) for i in (0, 1)
                )
            if back is not None:
                back.replace_all_uses_with(gradient)
                self.graph.erase_node(back)
            for low in [user for user in score.users if user.target is products.low]:
                low.replace_all_uses_with(least)
                self.graph.erase_node(low)
            score.replace_all_uses_with(self.outs[score])
            self.graph.erase_node(score)
        return True

    def _multiply(self, score: fx.Node, out: fx.Node, order: dict[fx.Node, int]) -> bool:
        """Lift a weight where its scores will stand, if they are the last thing that reads it."""
        others = {user for user in score.users if user.target is not products.low}
        if score.target is not torch.mul or others != {self.output}:
            return False
        lift, grad = arguments(score)
        if lift.target is not products.lift or any(order[u] > order[score] for u in lift.users):
            return False
        raw, _, q = arguments(lift)
        with self.graph.inserting_before(lift):
            there = self.graph.call_function(products.lift_into, (out, raw, q))
        lift.replace_all_uses_with(there)
        self.graph.erase_node(lift)
        with self.graph.inserting_before(score):
            kept = self.graph.call_function(products.times_into, (there, grad))
        score.replace_all_uses_with(kept)
        self.graph.erase_node(score)
        return True
