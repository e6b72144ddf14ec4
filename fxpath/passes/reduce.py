"""Pass: keep one row for each class of equal positions.

Requires a lifted graph.  Ensures that the reduced graph computes the same polynomial in |theta|, so
that path-norm and Path-Mag are the same; every axis of every activation has as many rows as it has
reachable classes, or observable ones where it is kept in sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import CAT, EXPAND, PERMUTE, RESHAPE
from fxpath.graph.costs import mapping, multiply_adds
from fxpath.graph.exact import exact_sums
from fxpath.graph.links import Link, extents, identity, on_paths, seen_through, static
from fxpath.graph.schema import arguments, bias_of, target
from fxpath.graph.stencil import Stencil, floats
from fxpath.graph.writer import Writer
from fxpath.passes.bases import Choice, Choose, cheapest, partitions
from fxpath.passes.classes import Classes, Partition, find_classes
from fxpath.passes.setting import Setting


def reduce(module: fx.GraphModule, setting: Setting, choose: Choose = cheapest) -> fx.GraphModule:
    """Reduce a lifted graph for the l^q path-norm.

    Args:
        module: a lifted graph; it is not changed.
        setting: its exponent is that to which fixed coefficients are raised here, before equal
            ones are added.
        choose: picks the activations that are kept in sums.

    Returns:
        A lifted graph module with the same placeholders, in the vocabulary of
        ``fxpath.graph.ops`` with ``ops.mix`` for fixed maps.
    """
    classes = find_classes(module.graph, setting.q)
    return _Reduction(module, classes, choose(classes)).run()


class _Reduction(Writer):
    def __init__(self, module: fx.GraphModule, classes: Classes, choice: Choice) -> None:
        super().__init__()
        self.module, self.classes, self.choice = module, classes, choice
        self.env: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        counted = on_paths(self.module.graph)
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.graph.output(self.env[arguments(node)[0]])
                continue
            if node not in counted and node.op != "placeholder":
                continue
            if node.op == "get_attr":
                self.env[node] = self.buffer(self.module.get_buffer(node.target), "constant")
            elif static(node):
                known = self.env[arguments(node)[0]] if node.target is ops.negative else None
                self.env[node] = known or self.graph.node_copy(node, self.env.__getitem__)
            else:
                seen = seen_through(node)
                self.env[node] = self._reduce(node) if seen is node else self.env[seen]
                self.env[node].meta.setdefault("origin", node.meta.get("origin"))
                # One node may stand for several.
                self.env[node].meta["full"] = *self.env[node].meta.get("full", ()), node
        return self.finish()

    # -- one operation ----------------------------------------------------------------------------

    def _reduce(self, node: fx.Node) -> fx.Node:
        if node.target is ops.source:
            return self._source(node)
        if node.target is ops.conv:
            return self._conv(node)
        if node.target is ops.constant:
            return self.emit(ops.constant, self._static(node, arguments(node)[0]))
        if node.target is ops.total:
            return self.emit(ops.total, [self._sum(seen_through(a)) for a in arguments(node)[0]])
        if node.target is CAT:
            dim = int(arguments(node)[1]) % len(extents(node))
            if self._basis(node)[dim].is_trivial:
                return self._plain_cat(node, dim)
            read = self.classes.reads[node]
            return self._sum_up([self._mapped(node, a, axes) for a, axes in read])
        mapped = {a: self._mapped(node, a, axes) for a, axes in self.classes.reads[node]}
        if node.target in (ops.shift, ops.clamp):
            return self._shift(node, mapped)
        if "stencil" in node.meta or node.target is EXPAND:
            return next(iter(mapped.values()))
        if node.target is RESHAPE:
            shape = [len(p) for p in self._basis(node)]
            return self.emit(RESHAPE, next(iter(mapped.values())), shape)
        args = list(
            fx.map_arg(arguments(node), lambda n: mapped.get(seen_through(n)) or self.env[n])
        )
        if bias_of(node) is not None:
            args[2] = self._bias(node)
        function = ops.maximum if node.target is ops.minimum else target(node)
        return self.emit(function, *args)

    def _source(self, node: fx.Node) -> fx.Node:
        basis = self._basis(node)
        if not self.choice[node]:
            return self.emit(ops.source, tuple(len(p) for p in basis))
        x = self.emit(ops.source, (1,) * len(basis))
        for dim, partition in enumerate(basis):
            x = self._mix(x, dim, _column(partition))
        return x

    def _conv(self, node: fx.Node) -> fx.Node:
        """Taps side by side along each reduced axis, and a stride of one kernel."""
        ((argument, axes),) = self.classes.reads[node]
        _, weight, _, stride, padding, dilation, transposed, output_padding, groups = arguments(
            node
        )
        spec = [list(v) for v in (stride, padding, dilation, output_padding)]
        reduced = [link for link in axes if link.dim >= 2 and not self._full(node, argument, link)]
        if reduced and self._cheaper_whole(node, argument, axes, reduced):
            return self._whole_conv(node, argument, axes)
        weight = self.env[weight]
        if transposed and reduced:
            reduced = [link for link in axes if link.dim >= 2]
            weight = self._untransposed(weight, groups)
            transposed = False
        x = self._mapped(node, argument, [link for link in axes if link.dim < 2], partial=True)
        x = self._whole(x, argument, {link.source_dim for link in axes})
        for link in reduced:
            x = self._mix(x, link.source_dim, self._taps(node, argument, link))
            for values, number in zip(spec, (len(link.taps), 0, 1, 0), strict=True):
                values[link.dim - 2] = number
        stride, padding, dilation, output_padding = spec
        others = transposed, output_padding, groups
        return self.emit(ops.conv, x, weight, self._bias(node), stride, padding, dilation, *others)

    def _cheaper_whole(
        self, node: fx.Node, argument: fx.Node, axes: Sequence[Link], reduced: Sequence[Link]
    ) -> bool:
        """Whether it costs less to expand a map, convolve it as it was, and take the classes then.

        So it is where each channel is convolved for itself and most positions differ: laying the
        taps side by side takes a matrix for each of them.
        """
        if self.choice[argument]:
            return False  # sums over classes do not tell what the positions hold
        kept = [len(p) for p in self._basis(argument)]
        out = [len(p) for p in self._basis(node)]
        laid = {link.source_dim: out[link.dim] * len(link.taps) for link in reduced}
        spatial = {link.dim for link in axes if link.dim >= 2}
        middle = [n if d in spatial else out[d] for d, n in enumerate(extents(node))]
        whole = [n if d in spatial else kept[d] for d, n in enumerate(extents(argument))]
        by_taps = mapping(kept, laid) + multiply_adds(node, out)
        expanded, gathered = _changed(kept, whole), _changed(middle, out)
        by_whole = mapping(kept, expanded) + multiply_adds(node) + mapping(middle, gathered)
        return by_whole < by_taps

    def _whole_conv(self, node: fx.Node, argument: fx.Node, axes: Sequence[Link]) -> fx.Node:
        """A convolution at full resolution, between maps in their bases."""
        lead = [link for link in axes if link.dim < 2]
        x = self._mapped(node, argument, lead, partial=True)
        x = self._whole(x, argument, {link.source_dim for link in lead})
        basis, bias = self._basis(node), self._bias(node)
        taken = [d for d in range(2, len(basis)) if not basis[d].is_trivial]
        weight, spec = self.env[arguments(node)[1]], arguments(node)[3:]
        y = self.emit(ops.conv, x, weight, None if taken else bias, *spec)
        y.meta["whole"] = True
        for dim in taken:
            size = len(basis[dim].of)
            every = Partition.trivial(size)
            y = self._mix(y, dim, self._matrix(node, dim, identity(size), every, False))
        return self.emit(ops.shift, y, bias) if taken and bias is not None else y

    def _untransposed(self, weight: fx.Node, groups: Any) -> fx.Node:
        """[in, out / groups, ...] of a transposed convolution as [out, in / groups, ...]."""
        inputs, outputs, *kernel = extents(weight)
        blocks = [groups, inputs // groups, outputs, *kernel]
        split = self.emit(RESHAPE, weight, blocks)
        order = [0, 2, 1, *range(3, len(blocks))]
        turned = self.emit(PERMUTE, split, order)
        shape = [groups * outputs, inputs // groups, *kernel]
        return self.emit(RESHAPE, turned, shape)

    def _shift(self, node: fx.Node, mapped: dict[fx.Node, fx.Node]) -> fx.Node:
        x = next(iter(mapped.values()))
        if node.target is ops.shift:
            return self.emit(ops.shift, x, self._static(node, arguments(node)[1]))
        if not self.choice[node]:
            return self.emit(ops.clamp, x, *arguments(node)[1:])
        for bound in arguments(node)[1:]:
            if bound:
                number = torch.full((1,) * len(extents(node)), float(bound), dtype=torch.float64)
                value = self.emit(ops.coefficient, self.buffer(number, "bound"))
                x = self.emit(ops.shift, x, self._static(node, value))
        return x

    def _bias(self, node: fx.Node) -> fx.Node | None:
        bias = bias_of(node)
        return None if bias is None else self._static(node, bias)

    def _static(self, node: fx.Node, value: Any) -> fx.Node:
        """A bias in the basis of the tensor that it enters."""
        bias = self.env.get(value, value)
        offset = len(extents(node)) - len(extents(bias))
        for dim, partition in enumerate(self._basis(node)):
            axis = dim - offset
            size = extents(bias)[axis] if axis >= 0 else 1
            if size == 1 and not self.choice[node] or size == len(partition) == len(partition.of):
                continue
            if axis < 0:  # sums need the axis that broadcasting would have supplied
                return self._static_axes(node, bias)
            if size == 1:
                bias = self._mix(bias, axis, _column(partition))
            else:
                whole = Partition.trivial(size)
                bias = self._mix(bias, axis, self._matrix(node, dim, identity(size), whole, False))
        return bias

    def _static_axes(self, node: fx.Node, bias: fx.Node) -> fx.Node:
        """A bias with leading axes of length 1 up to the rank of its tensor."""
        missing = len(extents(node)) - len(extents(bias))
        shape = [1] * missing + list(extents(bias))
        return self._static(node, self.emit(RESHAPE, bias, shape))

    def _plain_cat(self, node: fx.Node, dim: int) -> fx.Node:
        """Concatenation along an axis that is kept whole (channels)."""
        pieces = []
        for argument, axes in self.classes.reads[node]:
            others = [link for link in axes if link.dim != dim]
            piece = self._mapped(node, argument, others, partial=True)
            own = self._basis(argument)[dim]
            if not own.is_trivial:
                piece = self._mix(piece, dim, _expansion(own))
            pieces.append(piece)
        return self.emit(CAT, pieces, dim)

    def _sum_up(self, terms: list[fx.Node]) -> fx.Node:
        total, *rest = terms
        for term in rest:
            total = self.emit(ops.add, total, term)
        return total

    def _sum(self, argument: Any) -> fx.Node:
        """Class sizes, where an output of the network is kept by value."""
        x = self.env[argument]
        if self.choice[argument]:
            return x
        for dim, partition in enumerate(self._basis(argument)):
            if not partition.is_trivial:
                x = self._mix(x, dim, partition.sizes.double()[None])
        return x

    # -- bases ------------------------------------------------------------------------------------

    def _basis(self, node: fx.Node) -> list[Partition]:
        return partitions(self.classes, node, self.choice[node])

    def _full(self, node: fx.Node, argument: fx.Node, link: Link) -> bool:
        """Whether an axis is whole on both sides, so that a convolution runs as it was."""
        mine, other = self._basis(node)[link.dim], self._basis(argument)[link.source_dim]
        return mine.is_trivial and other.is_trivial

    def _mapped(
        self, node: fx.Node, argument: fx.Node, axes: Sequence[Link], partial: bool = False
    ) -> fx.Node:
        """An argument in the basis of its reader; axes that the reader mixes become whole."""
        x = self.env[argument]
        for link in axes:
            (tap,) = link.taps
            source = self._basis(argument)[link.source_dim]
            alike = source.is_trivial or self.choice[node] == self.choice[argument]
            if tap.is_identity and alike and _alike(source, self._basis(node)[link.dim]):
                continue
            matrix = self._matrix(node, link.dim, tap, source, self.choice[argument])
            x = self._mix(x, link.source_dim, matrix)
        if not partial:
            x = self._whole(x, argument, {link.source_dim for link in axes})
        return x

    def _whole(self, x: fx.Node, argument: fx.Node, linked: set[int]) -> fx.Node:
        for dim, partition in enumerate(self._basis(argument)):
            if dim not in linked and not partition.is_trivial:
                x = self._mix(x, dim, _expansion(partition))
        return x

    def _taps(self, node: fx.Node, argument: fx.Node, link: Link) -> Tensor:
        """Rows ordered by output position, then tap."""
        source = self._basis(argument)[link.source_dim]
        stacked = [
            self._matrix(node, link.dim, tap, source, self.choice[argument]) for tap in link.taps
        ]
        return torch.stack(stacked, 1).reshape(-1, len(source))

    def _matrix(
        self, node: fx.Node, dim: int, tap: Stencil, source: Partition, from_sums: bool
    ) -> Tensor:
        """A stencil between two bases, ``[output classes, input classes]`` in float64."""
        target, sums = self._basis(node)[dim], self.choice[node]
        kept = torch.ones(len(tap.row), dtype=torch.bool)
        if not sums:
            kept &= target.represents[tap.row]
        if from_sums:
            # All members of an observable class are read alike; one of them stands for all.
            kept &= source.represents[tap.position]
        places = target.of[tap.row[kept]] * len(source) + source.of[tap.position[kept]]
        places, code, table = exact_sums(places, tap.code[kept], tap.table)
        matrix = torch.zeros(len(target) * len(source), dtype=torch.float64)
        matrix[places] = floats(table)[code]
        return matrix.reshape(len(target), len(source))

    def _mix(self, x: fx.Node, dim: int, matrix: Tensor) -> fx.Node:
        if matrix.shape[0] == matrix.shape[1] and bool((matrix == torch.eye(len(matrix))).all()):
            return x
        return self.emit(ops.mix, x, dim, self.buffer(matrix, "matrix"))


def _changed(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    return {d: n for d, (m, n) in enumerate(zip(before, after, strict=True)) if m != n}


def _alike(a: Partition, b: Partition) -> bool:
    return a is b or torch.equal(a.of, b.of)


def _column(partition: Partition) -> Tensor:
    """Class sizes: what a constant along an axis sums up to."""
    return partition.sizes.double()[:, None]


def _expansion(partition: Partition) -> Tensor:
    """One row for each position, from one for each class of values."""
    matrix = torch.zeros(len(partition.of), len(partition), dtype=torch.float64)
    matrix[torch.arange(len(partition.of)), partition.of] = 1.0
    return matrix
