"""Path conditioning: the rescaling whose path kernel is nearest to a multiple of the identity.

Lebeurrier, Vayer and Gribonval, "Path-conditioned training: a principled way to rescale ReLU neural
networks" (2026).  A step of gradient descent on theta moves Phi by the kernel of its Jacobian
``J = d Phi / d theta``.  Phi is the same for all rescalings, and J is not.  With ``G = J^T J`` and
its diagonal

    g_i = sum over paths of (d Phi_p / d theta_i)^2 = d ||Phi||_2^2 / d (theta_i^2)

(where a path passes a parameter n times, the second is 1/n of the first, and the second is taken),
the rescaling asked for minimizes the log-det divergence of diag(G) from the nearest multiple of the
identity, ``p log(sum of g / p) - sum of log g``, over the p entries with g > 0.  An entry w that
becomes ``w exp(a_i - a_j)`` has ``g exp(-2 (a_i - a_j))``: the logarithms a of the groups' factors
(0 for inputs, outputs and what cannot be rescaled) minimize

    f(a) = log sum over entries of g exp(-2 (a_i - a_j))  +  2/p sum over entries of (a_i - a_j),

which is convex.  Along a path the differences add up to 0, so that f grows without bound in all
directions but common factors of groups that no entry with g > 0 ties to any other: the minimum is
attained, and unique.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.links import on_paths
from fxpath.model import Captured, Given, Model, Shapes, check_finite
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.passes import Setting, rewrite, take_in
from fxpath.passes.derive import leaves
from fxpath.program.flat import Flat
from fxpath.symmetry.balancing import Masses, times, transposed
from fxpath.symmetry.groups import ChannelGroups, find_groups
from fxpath.symmetry.masses import coordinates, ends_by_group, summed

#: How much of the masses in and out of a group may be left unbalanced.
TOLERANCE = 1e-10
#: Steps after which the search ends.
STEPS = 300
#: Steps of descent before the first of Newton.
DESCENT = 20
#: Iterations for one step of Newton.
SOLVES = 500
#: Below it a diagonal entry may have neighbours that float64 made zeros of.
SMALLEST = 1e-280


@plain_mode()
@torch.no_grad()
def path_conditioning(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> float:
    """How far the diagonal of the path kernel is from a multiple of the identity.

    With g_i the sum over paths of ``(d Phi_p / d theta_i)^2``, for the p effective parameters
    (batch norms folded in) that have g > 0; where a path passes one n times, it counts 1/n of that,

        log(sum of g / p) - sum of log g / p:

    the log-det divergence of Lebeurrier, Vayer and Gribonval (2026) per parameter, which is the
    logarithm of the arithmetic over the geometric mean of g.  In contrast to the path-norm it
    depends on the rescaling: ``fxpath.normalize(model, method="path_conditioning")`` minimizes it.

    Args:
        model: as for :func:`fxpath.analyze`; weights may be pruned or parametrized.
        input_shape: as for :func:`fxpath.analyze`.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.

    Returns:
        A number >= 0, in nats; 0 if all g are equal, or none is positive.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for a NaN or infinite parameter (named), an input shape that is missing and
            cannot be inferred.
        FloatingPointError: if float64 does not suffice.

    Example:
        >>> import fxpath
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> better = fxpath.normalize(model, method="path_conditioning")
        >>> fxpath.path_conditioning(better) < fxpath.path_conditioning(model)
        True
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    captured, lifted = take_in(model, given)
    check_finite({captured.tensors[key]: tensor for key, tensor in captured.live().items()})
    found = find_groups(captured, lifted)
    return kernel(captured, lifted, found, torch.zeros(len(found), dtype=torch.bool)).divergence


def conditioning_factors(
    captured: Captured, lifted: fx.GraphModule, found: ChannelGroups, free: Tensor
) -> Tensor:
    """Factors of channel groups for which :func:`path_conditioning` is least.

    Args:
        captured: the model.
        lifted: its lifted graph.
        found: its channel groups.
        free: which of them can have a factor, bool ``[groups]``.

    Returns:
        Tensor ``[groups]`` float64; 0 or inf where float64 does not hold a factor.

    Raises:
        FloatingPointError: if float64 does not suffice.
    """
    return conditioned(kernel(captured, lifted, found, free))[1:].exp()


@dataclass(frozen=True)
class Kernel:
    """The diagonal of G, summed by the groups that its entries lie between.

    Attributes:
        masses: sums of g by pairs of groups, group 0 being what has no factor.
        surplus: entries with g > 0 that enter each group, less those that leave it, ``[groups]``
            float64, by which f is not that of the plain balancing; 0 for group 0.
        entries: p, their number.
        mean_log: the mean of the logarithms of g.
    """

    masses: list[Masses]
    surplus: Tensor
    entries: int
    mean_log: float

    @property
    def divergence(self) -> float:
        """``log(sum of g / p) - sum of log g / p`` at the model as it is; 0 for no entry."""
        if not self.entries:
            return 0.0
        total = _log_sum([mass.log for mass in self.masses])
        return max(0.0, total - math.log(self.entries) - self.mean_log)


def kernel(
    captured: Captured, lifted: fx.GraphModule, found: ChannelGroups, free: Tensor
) -> Kernel:
    """The diagonal of G over ``||Phi||_2^2``.

    Args:
        captured: the model.
        lifted: its lifted graph.
        found: its channel groups.
        free: which of them can have a factor, bool ``[groups]``.

    Raises:
        FloatingPointError: if float64 does not suffice.
    """
    setting = Setting(captured, 2.0, effective=True)
    flat = Flat(rewrite(lifted, setting).lowered, setting)
    run, _, gradients = flat.gradients(captured.live(), torch.float64)
    if not math.isfinite(run.mantissa) or not run.fits(torch.float64):
        raise FloatingPointError("parts of the l^2 path-norm are beyond float64")
    # A rewritten graph has the coordinates of the lifted one in their order, but not those that
    # only a gate reads.
    passed = on_paths(lifted.graph)
    kept = [node for node in coordinates(lifted) if node in passed]
    of = dict(zip(coordinates(flat.module), kept, strict=True))
    ends = ends_by_group(lifted, found, free)
    masses: list[Masses] = []
    surplus = torch.zeros(1 + len(found), dtype=torch.float64)
    entries, logs = 0, 0.0
    for (node, _, _), g in zip(leaves(flat.module), gradients, strict=True):
        if node.target is not ops.coordinate or not g.numel():
            continue
        there = g > 0
        count = int(there.sum())
        if not count:
            continue
        if float(g[there].min()) < SMALLEST:
            raise FloatingPointError(f"derivatives by {node.args[1]} are beyond float64")
        name = str(node.args[1])
        masses.append(summed(name, g.sqrt(), ends[of[node]]))
        counted = summed(name, there.double(), ends[of[node]])
        entries, logs = entries + count, logs + float(g[there].log().sum())
        counts, ones = [counted.log.exp()], torch.ones_like(surplus)
        surplus += times([counted], counts, ones) - transposed([counted], counts, ones)
    surplus[0] = 0
    return Kernel(masses, surplus.round(), entries, logs / max(1, entries))


def conditioned(found: Kernel) -> Tensor:
    """Logarithms of the factors of least f, ``[groups]`` float64, group 0 first.

    Raises:
        FloatingPointError: if the search does not end.
    """
    logs = torch.zeros_like(found.surplus)
    if not found.entries:
        return logs
    state = _State(found, logs)
    for step in range(STEPS):
        if state.gap <= TOLERANCE:
            return logs
        better = state.newton() if step >= DESCENT else None
        if better is None:
            better = _State(found, logs + state.descent())
        logs, state = better.logs, better
    raise FloatingPointError(
        f"after {STEPS} steps the sums of the kernel into and out of some channels are still "
        f"unbalanced by {state.gap:.1e}: the weights span more than float64 holds"
    )


class _State:
    """The masses at some factors, as parts of their sum.

    Attributes:
        value: f.
        into: masses into each group, ``[groups]``.
        out: masses out of each group.
        gap: largest difference between a group's masses and its surplus, relative to them.
    """

    def __init__(self, found: Kernel, logs: Tensor) -> None:
        self.found, self.logs = found, logs
        moved = [m.log - 2 * (logs[m.out] - logs[m.into]) for m in found.masses]
        total = _log_sum(moved)
        self.parts = [each.sub_(total).exp_() for each in moved]
        self.share = found.surplus / found.entries
        self.value = total + 2 * float(self.share @ logs)
        ones = torch.ones_like(logs)
        self.into, self.out = self._times(ones), self._transposed(ones)
        rest = self.share - self.into + self.out
        rest[0] = 0
        self.slope = 2 * rest
        size = self.into + self.out + self.share.abs()
        self.gap = float((rest.abs() / size.clamp(min=1 / found.entries)).max())

    def _times(self, x: Tensor) -> Tensor:
        """The parts, as one matrix, times a vector over groups."""
        return times(self.found.masses, self.parts, x)

    def _transposed(self, x: Tensor) -> Tensor:
        return transposed(self.found.masses, self.parts, x)

    def descent(self) -> Tensor:
        """A step that cannot raise f.

        By exp(x - y) <= (exp(2 x) + exp(-2 y)) / 2, for each group

            into exp(-4 d) / 2 + out exp(4 d) / 2 + 2 share d,

        with the sum of all masses held, is an upper bound of its own; x = exp(4 d) at its minimum
        solves a quadratic equation.
        """
        least = torch.finfo(torch.float64).tiny ** 0.5
        into, out = self.into.clamp(min=least), self.out.clamp(min=least)
        root = (self.share.square() + 4 * into * out).sqrt()
        up = self.share >= 0  # of two forms of the root the one in which nothing cancels
        ratio = torch.where(up, 2 * into / (root + self.share), (root - self.share) / (2 * out))
        step = ratio.log() / 4
        step[0] = 0
        return step

    def newton(self) -> _State | None:
        """The state after a step of Newton, or of a part of it; ``None`` if that does not help.

        The Hessian is 4 times the Laplacian of the parts, less the outer product of the gradient of
        the logarithm of their sum with itself.  Conjugate gradients, in coordinates where its
        diagonal is 1.
        """
        root = (self.into + self.out).clamp(min=1 / self.found.entries**2).sqrt()
        pull = 2 * (self.out - self.into) / root
        pull[0] = 0
        residual = -self.slope / root
        step, direction, square = torch.zeros_like(root), residual, float(residual @ residual)
        goal = square * min(0.1, self.gap) ** 2
        for _ in range(SOLVES):
            if square <= goal or square == 0:
                break
            scaled = direction / root
            around = self._times(scaled) + self._transposed(scaled)
            mapped = 4 * ((self.into + self.out) * scaled - around) / root
            mapped -= pull * float(pull @ direction)
            mapped[0] = 0
            curvature = float(direction @ mapped)
            if curvature <= 0:  # flat, down to rounding
                break
            length = square / curvature
            step = step + length * direction
            residual = residual - length * mapped
            before, square = square, float(residual @ residual)
            direction = residual + (square / before) * direction
        step = step / root
        for halvings in range(6):
            found = _State(self.found, self.logs + step / 2**halvings)
            if found.value <= self.value + 1e-13 * max(1.0, abs(self.value)):
                return found
        return None


def _log_sum(logs: Sequence[Tensor]) -> float:
    return float(torch.stack([each.logsumexp((0, 1)) for each in logs]).logsumexp(0))
