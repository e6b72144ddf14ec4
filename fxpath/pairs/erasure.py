"""A model held against itself with entries of its weights set to zero: what pruning loses.

All such pairs share one capture, and (7) holds for each of them: no path gains.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.errors import UnsupportedModelError
from fxpath.graph import ops
from fxpath.graph.interpret import Weighing
from fxpath.graph.schema import arguments
from fxpath.model import Given, Model
from fxpath.pairs.bounds import Bound
from fxpath.pairs.difference import Difference, Excess, Rows
from fxpath.pairs.matching import side_of
from fxpath.pairs.metric import PathMetric
from fxpath.pairs.pair import BLOCK, Pair, Side, Weights
from fxpath.passes import Setting, rewrite, take_in
from fxpath.passes.followed import check_bounded
from fxpath.passes.reduce import reduce
from fxpath.program.formats import format_of
from fxpath.program.program import PathProgram
from fxpath.program.record import read_by
from fxpath.sharding import check_alike


@dataclass(frozen=True)
class Erasure:
    """A captured model whose weights are to be set to zero, in any number of ways.

    Attributes:
        program: evaluates path-norm and Path-Mag.
        side: the model as the first network of each pair.
    """

    program: PathProgram
    side: Side

    @classmethod
    def of(cls, model: Model, given: Given) -> Erasure:
        """Capture a model.

        Raises:
            UnsupportedModelError: listing every operation without an exact rule.
            ValueError: for a NaN or infinite parameter, a shape that cannot be inferred.
        """
        captured, lifted = take_in(model, given, sharded=True)
        graphs = rewrite(lifted, Setting(captured))
        program = PathProgram(captured, graphs, format_of(captured, lifted), 1.0, given=given)
        side = side_of(captured, lifted)
        check_alike({n: side.tensors[key] for key, n in read_by(captured, lifted).items()})
        return cls(program, side)

    def metric(self, tensors: Mapping[str, Tensor]) -> PathMetric:
        """The path-metric to the model with other tensors, by placeholder.

        Its bounds that are evaluated late cannot tell whether the model has changed since: see
        :meth:`certificate`.
        """
        return PathMetric(self._pair(tensors), self.program.reduced)

    def certificate(self, tensors: Mapping[str, Tensor]) -> PathMetric:
        """The same, for a caller who keeps it."""
        return PathMetric(self._pair(tensors).remember(), self.program.reduced)

    def bound(self, tensors: Mapping[str, Tensor]) -> Bound | None:
        """How far outputs can be from the model's, for inputs in [-1, 1], where gates take part.

        ``None`` where something inside a gate has no rule, or an activation jumps.
        """
        try:
            check_bounded(self.program.captured, self.program.lifted)
        except UnsupportedModelError:
            return None
        return Bound(self._pair(tensors).remember(), None, 1.0, 1.0)

    def cut_off(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Output neurons that paths from inputs reach in the model, and with other tensors not."""
        # Without sums: in those, outputs are no longer apart.
        lifted, setting = self.program.lifted, Setting(self.program.captured)
        reduced = reduce(lifted, setting, lambda classes: dict.fromkeys(classes.reachable, False))
        (total,) = (node for node in lifted.graph.nodes if node.target is ops.total)
        reach = _Reach(reduced, self._pair(tensors), set(arguments(total)[0]))
        reach.outcome()
        found: dict[str, None] = {}
        for key, node in zip(self.program.captured.outputs, arguments(total)[0], strict=True):
            reached = reach.reached[node]
            lost = (reached.first > 0) & (reached.second == 0)
            found |= dict.fromkeys(_named(lost, tuple(node.meta["val"].shape), f"output {key!r}"))
        return list(found)

    def _pair(self, tensors: Mapping[str, Tensor]) -> Pair:
        return Pair(
            self.program.lifted, self.side, replace(self.side, tensors=tensors), erased=True
        )


def _named(lost: Tensor, shape: Sequence[int], output: str) -> list[str]:
    """Names for entries of an output: by the one axis that they are all of along, if there is one.

    Args:
        lost: which ones; positions along axes shorter than in ``shape`` are classes of positions.
        shape: of the output, the axis of the batch with one entry.
        output: its name.
    """
    if not bool(lost.any()):
        return []
    axes = [axis for axis in (1, *range(lost.dim() - 1, -1, -1)) if axis < lost.dim()]
    for axis in axes:
        along = lost.movedim(axis, 0).reshape(lost.shape[axis], -1)
        whole = bool((along.all(1) == along.any(1)).all())
        if whole and lost.shape[axis] == shape[axis] > 1:
            kind = "channel {}" if axis == 1 else f"position {{}} along axis {axis}"
            return [f"{kind.format(i)} of {output}" for i in along.all(1).nonzero()[:, 0].tolist()]
    return [f"{'' if bool(lost.all()) else 'a part of '}{output}"]


def estimated_loss(
    program: PathProgram, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> float:
    """The relative path-metric of an erasure but for what cancels, and much faster."""
    logs = []
    for tensors in (ours, theirs):
        run = program.flat.norm(tensors, torch.float64)
        log = math.log(run.mantissa) if run.mantissa > 0 else -math.inf
        logs.append(log + run.exponent * math.log(2))
    return -math.expm1(logs[1] - logs[0]) if math.isfinite(logs[0]) else 0.0


class _Reach(Difference):
    """1 for the neurons that a path from an input reaches, in either network, else 0.

    Attributes:
        reached: those of some nodes of the graph at full resolution.
    """

    def __init__(self, module: fx.GraphModule, pair: Pair, kept: Container[fx.Node]) -> None:
        super().__init__(module, pair, biases=False)
        # Ones and zeros need no digits.
        self.dtype = torch.float32
        self.kept = kept
        self.reached: dict[fx.Node, Excess] = {}

    def made(self, value: Any) -> Any:
        for full in self.node.meta.get("full", ()):
            if full in self.kept:
                self.reached[full] = value
        return value

    def lifted(self, value: Tensor) -> Tensor:
        # 1e-60 is a path as well.
        return (value != 0).to(self.dtype)

    def mix(self, x: Excess | Weights, dim: int, matrix: Tensor) -> Excess | Weights:
        return super().mix(x, dim, self.lifted(matrix))

    def add(self, x: Excess, y: Excess) -> Excess:
        return super().add(x, y).map(lambda value: (value > 0).to(self.dtype))

    def coordinate(self, value: Tensor, name: str) -> Weights | Rows:
        leaf = self.node.meta["leaf"]
        if self.read_by_rows():
            return Rows(leaf)
        first = self._there(self.pair.ours, leaf)
        if self.pair.ours.stored(leaf) is self.pair.theirs.stored(leaf):
            return Weights.equal(first)
        return Weights(first, self._there(self.pair.theirs, leaf), first)

    def weigh(
        self, x: Excess, weight: Weights | Rows, bias: Weights | None, run: Weighing
    ) -> Excess:
        if isinstance(weight, Weights):
            return super().weigh(x, weight, bias, run)
        sides = (x.first, self.pair.ours), (x.second, self.pair.theirs)
        y = Excess(*(self._by_rows(h, side, weight.leaf, run) for h, side in sides))
        return y if bias is None else self.shift(y, bias)

    def _by_rows(self, h: Tensor, side: Side, leaf: int, run: Weighing) -> Tensor:
        """The neurons that a large matrix reaches, a few rows at a time."""
        weight = side.stored(leaf)
        rows = weight.split(max(1, BLOCK * len(weight) // weight.numel()))
        found = [run(h, self.lifted(block)) > 0 for block in rows]
        return torch.cat(found, -1).to(self.dtype)

    def _there(self, side: Side, leaf: int) -> Tensor:
        """Where an effective parameter is not zero, without a product that could underflow."""
        read = arguments(side.nodes[leaf])[0]
        if read.target is not ops.folded_weight:
            return self.lifted(side.evaluate(read))
        weight, factor, *where = arguments(read)
        weight, factor = (self.lifted(side.evaluate(n)) for n in (weight, factor))
        return ops.folded_weight(weight, factor, *where)

    def product(self, x: Excess, w: Weights, run: Weighing) -> Excess:
        def reached(a: Tensor, b: Tensor) -> Tensor:
            return (run(a, b) > 0).to(self.dtype)

        first = reached(x.first, w.first)
        alike = x.second is x.first and w.second is w.first
        return Excess(first, first if alike else reached(x.second, w.second))
