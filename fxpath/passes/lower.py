"""Pass: choose how each layer of the program is computed.

Requires a lifted graph, reduced or not.  Ensures the same polynomial in |theta|, such that

- a convolution with few output positions is one matrix product (``ops.window``), in which the maps
  between bases before it are merged with its taps: a convolution's derivatives at
  3 x 3 positions take four times as long; taps that read one position each are lists of positions;
- maps along several axes are one map over all positions, where that is cheap: fewer steps;
- a folded batch norm multiplies a layer's outputs and not its weights, which are read where they
  are, and adds its bias in the same step.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.costs import mapping, multiply_adds
from fxpath.graph.edit import drop_dead, form
from fxpath.graph.links import Kernel, extents, seen_through
from fxpath.graph.schema import arguments
from fxpath.graph.writer import Writer
from fxpath.passes.setting import Setting

#: Output positions up to which a convolution that was not reduced is lowered to a product.
FEW = 256

#: Entries up to which a map is written down as a matrix.
LARGEST_MATRIX = 1 << 20

#: Multiply-adds up to which one map over all positions is faster than one along each axis.
CHEAP = 1 << 23

#: Maps by axis, and what they are applied to.
Maps = tuple[fx.Node, dict[int, Tensor]]


def lower(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Lower a graph; ``module`` itself is not changed.

    Returns:
        A graph module with the same placeholders, in the vocabulary of ``fxpath.graph.ops``.
    """
    return _Lowering(module).run(setting.effective)


class _Lowering(Writer):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.copy(module)

    def run(self, effective: bool) -> fx.GraphModule:
        for node in self.graph.nodes:
            seen = seen_through(node)
            if seen is not node:
                node.replace_all_uses_with(seen)
        drop_dead(self.graph)
        steps = {ops.conv: self._window, ops.mix: self._merge}
        for target, step in steps.items():
            # Backwards: a chain of maps is merged from its end.
            for node in reversed(self.graph.nodes):
                if node.target is target:
                    step(node)
            drop_dead(self.graph)
        for node in list(self.graph.nodes):
            if node.target is ops.folded_weight and not effective:
                self._scale_outputs(node)
        return self.finish()

    # -- fixed maps -------------------------------------------------------------------------------

    def _maps(self, x: fx.Node) -> Maps:
        """The maps along axes behind a value that nothing else reads."""
        maps: dict[int, Tensor] = {}
        while x.target is ops.mix and len(x.users) == 1:
            inner, dim, matrix = arguments(x)
            if dim < 2:
                break
            value = self.held(matrix)
            maps[dim] = maps[dim] @ value if dim in maps else value
            x = inner
        return x, maps

    def _merge(self, node: fx.Node) -> None:
        """Maps along several axes become one."""
        if not node.users:
            return
        x, dim, matrix = arguments(node)
        source, before = self._maps(x)
        maps = dict(before)
        if dim < 2 or not before:
            return
        value = self.held(matrix)
        maps[dim] = value @ maps[dim] if dim in maps else value
        sizes, out = extents(source), extents(node)
        lead = math.prod(sizes[:2])
        if not _affordable(lead, math.prod(sizes[2:]), math.prod(out[2:])):
            return
        merged = torch.ones(1, 1, dtype=torch.float64)
        for axis in range(2, len(sizes)):
            merged = torch.kron(merged, maps.get(axis, torch.eye(sizes[axis], dtype=torch.float64)))
        with self.graph.inserting_before(node):
            flat = self.reshape(source, (*sizes[:2], math.prod(sizes[2:])))
            mixed = self.emit(ops.mix, flat, 2, self.buffer(merged, "map"))
            shaped = self.reshape(mixed, out)
        self._replace(node, shaped)

    # -- convolutions -----------------------------------------------------------------------------

    def _window(self, node: fx.Node) -> None:
        """Replace a convolution by a product, if it has few positions."""
        x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments(node)
        source, before = self._maps(x)
        kernel, out, sizes = extents(weight)[2:], extents(node)[2:], extents(x)[2:]
        if transposed or "whole" in node.meta or not (before or math.prod(out) <= FEW):
            return
        axes = zip(itertools.count(2), sizes, out, kernel, strict=False)
        laid = {axis: o * k for axis, n, o, k in axes if (o, k) != (n, 1)}
        if not before and mapping(extents(x), laid) > multiply_adds(node):
            return
        if any(n * o * k > LARGEST_MATRIX for n, o, k in zip(sizes, out, kernel, strict=True)):
            return
        taps: list[Tensor] = []
        for axis, size in enumerate(sizes):
            spec = (stride[axis], padding[axis], dilation[axis], False)
            read = _taps(size, out[axis], kernel[axis], *spec)
            taps.append(read @ before[2 + axis] if 2 + axis in before else read)
        picked = _picked(taps)
        positions, reads = math.prod(extents(source)[2:]), math.prod((*out, *kernel))
        lead = math.prod(extents(source)[:2])
        if picked is None and len(taps) > 1 and _affordable(lead, positions, reads):
            taps = [_product(taps)]
        with self.graph.inserting_before(node):
            matrices: list[fx.Node | None]
            if picked is None:
                matrices = [self._taps_or_none(each) for each in taps]
            else:
                matrices = [self.buffer(picked, "positions")]
            window = self.emit(ops.window, source, weight, bias, matrices, list(out), groups)
        self._replace(node, window)

    def _taps_or_none(self, taps: Tensor) -> fx.Node | None:
        return None if _is_identity(taps) else self.buffer(taps, "map")

    # -- batch norms ------------------------------------------------------------------------------

    def _scale_outputs(self, folded: fx.Node) -> None:
        """Multiply the outputs of the one layer that reads a folded weight.

        The shares of the weight are the same, as those of every factor of a product are.
        """
        weight, factor, channels, _ = arguments(folded)
        coordinate = _only_user(folded, ops.coordinate)
        layer = _only_user(coordinate, ops.window, ops.conv, ops.contract)
        if channels != 0 or coordinate is None or layer is None:
            return
        coordinate.replace_input_with(folded, weight)
        coordinate.meta["val"] = form(weight.meta["val"])
        with self.graph.inserting_before(layer):
            fixed = self.emit(ops.coefficient, factor)
            factored = self.emit(ops.factored, coordinate, fixed)
        layer.replace_input_with(coordinate, factored)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        new.meta["origin"] = old.meta.get("origin")
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)


def _only_user(node: fx.Node | None, *targets: Any) -> fx.Node | None:
    """The one reader of a value, if it is of the kind that is looked for."""
    if node is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.target in targets else None


def _affordable(lead: int, size: int, out: int) -> bool:
    """Whether one matrix for all positions is small, and cheap to apply."""
    return lead * size * out <= CHEAP and size * out <= LARGEST_MATRIX


def _taps(size: int, out: int, *spec: Any) -> Tensor:
    """What each tap reads along one axis: ``[taps, out, in]``."""
    kernel = Kernel(size, out, *spec)
    dense = torch.zeros(len(kernel), out, size, dtype=torch.float64)
    for k, tap in enumerate(kernel):
        dense[k, tap.row, tap.position] = tap.values()
    return dense


def _is_identity(taps: Tensor) -> bool:
    count, out, size = taps.shape
    return count == 1 and out == size and torch.equal(taps[0], torch.eye(size, dtype=taps.dtype))


def _picked(taps: list[Tensor]) -> Tensor | None:
    """The one position that each tap reads as it is, ``[taps, out]``, if no tap reads more.

    Positions are counted over all axes; their number stands for none.
    """
    if all(_is_identity(each) for each in taps):
        return None  # nothing has to be picked
    if not all(bool(((each == 0) | (each == 1)).all() & (each.sum(2) <= 1).all()) for each in taps):
        return None
    position, beside = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    for each in taps:
        k, o, size = each.shape
        reads, own = each.amax(2) != 0, each.argmax(2)
        position = (position[:, None, :, None] * size + own[None, :, None, :]).reshape(
            len(position) * k, -1
        )
        beside = (beside[:, None, :, None] | ~reads[None, :, None, :]).reshape(len(beside) * k, -1)
    return torch.where(beside, math.prod(each.shape[2] for each in taps), position)


def _product(taps: list[Tensor]) -> Tensor:
    """Taps along several axes as those over all positions: ``[taps, out, in]``, each flattened."""
    merged = torch.ones(1, 1, 1, dtype=torch.float64)
    for each in taps:
        k, o, s = merged.shape
        m, p, t = each.shape
        merged = torch.einsum("kos,mpt->kmopst", merged, each).reshape(k * m, o * p, s * t)
    return merged
