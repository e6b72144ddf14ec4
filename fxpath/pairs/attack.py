"""Differences that are attained: what a bound is held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: R_theta: inputs of one sample -> outputs in a row, float64.
Function = Callable[[Sequence[Tensor]], Tensor]

#: Entries of inputs that a search looks at together.
CHUNK = 1 << 14


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


def difference_at(
    ours: Function,
    theirs: Function,
    samples: Sequence[Sequence[Tensor]],
    norm: float,
    seconds: float = math.inf,
    progress: Callable[[Progress], None] | None = None,
) -> float:
    """The largest ``||R_theta(x) - R_theta'(x)||`` on given samples.

    Args:
        ours: the first network.
        theirs: the second one.
        samples: inputs of each sample.
        norm: 1, 2 or inf.
        seconds: when to stop, after the evaluation that is under way.
        progress: called after each evaluation.
    """
    end, best = time.monotonic() + seconds, 0.0
    for done, sample in enumerate(samples, 1):
        with torch.no_grad():
            gap = torch.linalg.vector_norm(ours(sample) - theirs(sample), norm)
        best = max(best, gap.item())
        if progress is not None:
            progress(Progress(done, len(samples), best))
        if time.monotonic() > end:
            break
    return best


@torch.enable_grad()
def largest_difference(
    ours: Function,
    theirs: Function,
    shapes: Sequence[Sequence[int]],
    radius: float,
    norm: float,
    starts: int = 32,
    steps: int = 40,
    seconds: float = math.inf,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | None = None,
) -> float:
    """The largest ``||R_theta(x) - R_theta'(x)||`` found for inputs with ``||x||_inf <= radius``.

    Random inputs (corners of the cube among them), then projected gradient ascent; the same inputs
    in every call.

    Args:
        ours: the first network.
        theirs: the second one.
        shapes: shapes of the inputs.
        radius: size of the cube.
        norm: 1, 2 or inf.
        starts: number of inputs.
        steps: number of gradient steps from each.
        seconds: when to stop, after the evaluation that is under way.
        progress: called after each evaluation.
        device: where the networks are.

    Example:
        >>> largest_difference(lambda x: 3 * x[0], lambda x: x[0], [(2,)], radius=0.5, norm=1)
        2.0
    """
    end = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)

    def gap(inputs: Sequence[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(ours(inputs) - theirs(inputs), norm)

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
