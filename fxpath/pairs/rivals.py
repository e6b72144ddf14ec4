"""What a bound is held against: bounds that rescaling changes, and differences that are attained.

The bounds (2), (9) and (29) know layered fully connected networks only,
``R_theta(x) = M_L ReLU(M_{L-1} ... ReLU(M_1 x))``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import CASTS, DROPOUTS, SAME
from fxpath.graph.equations import letters
from fxpath.graph.links import static
from fxpath.graph.schema import arguments
from fxpath.model import Captured
from fxpath.pairs.pair import Pair, Side, agreement

__all__ = ["Layered", "Progress", "find_layered", "largest_difference", "realization"]

aten = torch.ops.aten

#: What may stand between the layers of a fully connected network.
BETWEEN = {
    aten.relu.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    *SAME,
    *DROPOUTS,
    *CASTS,
}


@dataclass(frozen=True)
class Layered:
    """A pair of layered fully connected networks.

    Attributes:
        layers: number of matrices, L.
        width: largest number of neurons in a layer, inputs and outputs included, W.
        norm: R: at least 1, and the largest l^1 norm of a row of a matrix (and size of a bias) in
            either network.
        distance: ``||theta - theta'||_inf``.
        biases: whether there are any.
        signs_agree: whether ``theta_i * theta'_i >= 0``.
    """

    layers: int
    width: int
    norm: float
    distance: float
    biases: bool
    signs_agree: bool

    def bounds(self, radius: float) -> dict[str, float]:
        """The bounds of ``||R_theta(x) - R_theta'(x)||_1`` that apply, for ``||x||_inf <= radius``.

        ``(2)``; with biases it is meant for ``||x||_inf >= 1``, and 1 is taken where the radius is
        smaller.  Without biases ``(5) with (9)``, which is (29) and needs signs that agree, or
        ``Corollary G.1``, which does not, with 2 L in the place of L.
        """
        common = self.norm ** (self.layers - 1) * self.distance
        reach = max(radius, 1.0) if self.biases else radius
        found = {"(2)": (self.width * reach + 1) * self.width * self.layers**2 * common}
        if not self.biases:
            metric = self.layers * self.width**2 * common
            if self.signs_agree:
                found["(5) with (9), (29)"] = max(radius, 1.0) * metric
            else:
                found["Corollary G.1"] = max(radius, 1.0) * 2 * metric
        return found

    @property
    def metric(self) -> float | None:
        """The bound (9) of the path-metric; ``None`` with biases."""
        if self.biases:
            return None
        return self.layers * self.width**2 * self.norm ** (self.layers - 1) * self.distance


def find_layered(pair: Pair) -> Layered | None:
    """Whether a pair of networks is layered and fully connected."""
    calls = _active(pair.ours.captured)
    active = [n for n in pair.lifted.graph.nodes if n.op == "call_function" and not static(n)]
    linear = [n for n in active if n.target is ops.contract]
    if not all(n.target in {*BETWEEN, aten.linear.default} for n in calls):
        return None
    if not all(len(n.users) <= 1 for n in active) or not _alternating(calls):
        return None
    if any(math.prod(n.meta["val"].shape[:-1]) != 1 for n in linear):
        return None
    if not all(letters(arguments(n)[3]).dense for n in linear):
        return None
    norm, distance, biases, agree = 1.0, 0.0, False, True
    for leaf, node in enumerate(pair.ours.nodes):
        if node.target is not ops.coordinate:
            return None
        first, second = pair.values(leaf)
        distance = max(distance, (first - second).abs().amax().item())
        agree = agree and bool(agreement(first, second).all())
        biases = biases or first.dim() == 1
        for value in (first.abs(), second.abs()):
            norm = max(norm, (value.sum(1) if value.dim() > 1 else value).amax().item())
    widths = [n for node in linear for n in arguments(node)[1].meta["val"].shape]
    return Layered(len(linear), max(widths), norm, distance, biases, agree)


def _active(captured: Captured) -> list[fx.Node]:
    """Operations of a captured graph that read an input, directly or not."""
    found: dict[fx.Node, None] = {}
    for node in captured.graph_module.graph.nodes:
        fed = node.op == "placeholder" and node.name not in captured.tensors
        if fed or any(n in found for n in node.all_input_nodes):
            found[node] = None
    return [node for node in found if node.op == "call_function"]


def _alternating(calls: Sequence[fx.Node]) -> bool:
    """Whether a ReLU stands between any two linear maps, and none after the last."""
    kinds = [n.target for n in calls if n.target in (aten.linear.default, aten.relu.default)]
    return kinds == [aten.linear.default, aten.relu.default] * (len(kinds) // 2) + [
        aten.linear.default
    ]


# -- differences that are attained -----------------------------------------------------------------


#: Entries of inputs that a search looks at together.
CHUNK = 1 << 14


class _Double(fx.Interpreter):
    """Runs a captured graph in float64, whatever it casts to."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in CASTS and args[0].is_floating_point():
            return args[0]
        return super().call_function(target, args, kwargs)


def realization(side: Side) -> Callable[[Sequence[Tensor]], Tensor]:
    """R_theta in float64: inputs of one sample, as captured -> outputs, flattened in a row."""
    graph = side.captured.graph_module
    tensors = {
        name: value.to(torch.float64) if value.is_floating_point() else value
        for name, value in side.tensors.items()
    }

    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    read = [n for n in placeholders if n.users and n.name not in tensors]

    def run(inputs: Sequence[Tensor]) -> Tensor:
        if len(inputs) != len(read):
            raise ValueError(
                f"{len(inputs)} inputs carry values, but the network reads {len(read)}: one of "
                "them serves for its shape alone; leave it out of the model's arguments"
            )
        given = dict(zip(read, inputs, strict=True))
        values = [tensors[n.name] if n.name in tensors else given.get(n) for n in placeholders]
        outputs = _Double(graph).run(*values)
        return torch.cat([y.flatten() for y in outputs if y.is_floating_point()])

    return run


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Attributes:
        done: evaluations so far.
        planned: evaluations that it takes to the end.
        best: the largest difference so far.
    """

    done: int
    planned: int
    best: float


def largest_difference(
    pair: Pair,
    shapes: Sequence[Sequence[int]],
    radius: float,
    norm: float,
    starts: int = 32,
    steps: int = 40,
    seconds: float = math.inf,
    progress: Callable[[Progress], None] | None = None,
) -> float:
    """The largest ``||R_theta(x) - R_theta'(x)||`` found for inputs with ``||x||_inf <= radius``.

    Random inputs (corners of the cube among them), then projected gradient ascent; the same inputs
    in every call.

    Args:
        pair: the two networks.
        shapes: shapes of the inputs.
        radius: size of the cube.
        norm: 1, 2 or inf.
        starts: number of inputs.
        steps: number of gradient steps from each.
        seconds: when to stop, after the evaluation that is under way.
        progress: called after each evaluation.
    """
    end = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)
    device = next((t.device for t in pair.ours.tensors.values()), torch.device("cpu"))
    ours, theirs = realization(pair.ours), realization(pair.theirs)

    def gap(inputs: Sequence[Tensor]) -> Tensor:
        difference = ours(inputs) - theirs(inputs)
        return torch.linalg.vector_norm(difference, norm)

    def draw(shape: Sequence[int]) -> Tensor:
        x = torch.rand((starts, *shape), generator=generator, dtype=torch.float64) * 2 - 1
        x[::2].sign_()
        return (x * radius).to(device)

    drawn = [draw(shape) for shape in shapes]
    size = max(1, CHUNK // max(1, sum(x[0].numel() for x in drawn)))
    chunks = [
        [part.requires_grad_() for part in parts]
        for parts in zip(*(x.split(size) for x in drawn), strict=True)
    ]
    gaps = torch.func.vmap(gap)
    best, done = 0.0, 0
    for step in range(steps):
        for points in chunks:
            values = gaps(points)
            best, done = max(best, values.amax().item()), done + 1
            if progress is not None:
                progress(Progress(done, steps * len(chunks), best))
            if not values.requires_grad or time.monotonic() > end:
                return best
            gradients = torch.autograd.grad(values.sum(), points, allow_unused=True)
            stride = radius * (1 - step / steps) / 2
            with torch.no_grad():
                for x, gradient in zip(points, gradients, strict=True):
                    if gradient is not None:
                        x.add_(gradient.sign() * stride).clamp_(-radius, radius)
    return best
