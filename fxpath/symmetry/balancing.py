"""Matrix balancing: factors of groups for which the sum of squares of all edges is least.

An edge of weight w from group j to group i becomes ``w exp(a_i - a_j)``.  With the masses
``m[i, j]``, the sums of w^2 over the edges from j to i, this minimizes

    f(a) = sum over i, j of  m[i, j] exp(2 (a_i - a_j)),        a_0 = 0,

where group 0 is all whose scale is given.  It is Osborne's balancing of the matrix m (1960): f is
convex, and least where the mass that enters each group equals the mass that leaves it.

The least value is attained on each strongly connected component of the groups, by factors that are
unique there (up to a common one in a component without group 0).  Edges between two components can
be made as small as one likes, all at once, without any effect on others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

#: How much the mass into a group may differ from the mass out of it, relative to their sum.
TOLERANCE = 1e-11
#: Steps after which the search ends; networks rescaled by 1e30 take about 30.
STEPS = 200
#: Steps of descent before the first of Newton: each halves what is wrong between neighbours.
DESCENT = 6
#: Iterations for one step of Newton.
SOLVES = 400


@dataclass(frozen=True)
class Masses:
    """Logarithms of the masses of edges, ``[rows, columns]``; -inf where there is none.

    Attributes:
        log: of the masses, float64.
        out: groups that the edges end at, ``[rows, 1]``.
        into: groups that they begin at: ``[1, columns]``, or ``[rows, 1]`` for a list of edges.
    """

    log: Tensor
    out: Tensor
    into: Tensor

    @property
    def listed(self) -> bool:
        """Whether this is a list of edges."""
        return self.into.shape[1] == 1


def times(masses: Sequence[Masses], parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """Numbers for all edges, as one matrix, times a vector over groups; ``parts`` are as `log`."""
    y = torch.zeros_like(x)
    for m, part in zip(masses, parts, strict=True):
        read = x[m.into]
        y.index_add_(0, m.out[:, 0], (part * read)[:, 0] if m.listed else part @ read[0])
    return y


def transposed(masses: Sequence[Masses], parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """The transpose of the same."""
    y = torch.zeros_like(x)
    for m, part in zip(masses, parts, strict=True):
        read = x[m.out[:, 0]]
        y.index_add_(0, m.into.reshape(-1), part[:, 0] * read if m.listed else read @ part)
    return y


@dataclass(frozen=True)
class Balance:
    """Factors of groups.

    Attributes:
        logs: natural logarithms of the factors, ``[groups]`` float64.
        component: strongly connected component of each group, ``[groups]``; 0 is that of group 0.
    """

    logs: Tensor
    component: Tensor


def balance(masses: Sequence[Masses], groups: int) -> Balance:
    """Minimize f.

    Args:
        masses: of all edges; several may have the same ends.
        groups: their number, group 0 included.

    Raises:
        FloatingPointError: if masses remain that differ by more than rounding.
    """
    masses = _joined(masses)
    component = _components([_Edges(m, m.log > -torch.inf) for m in masses], groups)
    inner = []
    for each in masses:
        # An edge within one group keeps its mass.
        apart = (component[each.out] != component[each.into]) | (each.out == each.into)
        inner.append(Masses(each.log.masked_fill(apart, -torch.inf), each.out, each.into))
    logs = _minimum(inner, groups)
    # Where nothing is given, the first group stays.
    first = torch.full((groups,), groups).scatter_reduce_(
        0, component, torch.arange(groups), "amin"
    )
    return Balance(logs - logs[first[component]], component)


def _joined(masses: Sequence[Masses]) -> list[Masses]:
    """All lists of edges, and single columns, as one list."""
    matrices = [m for m in masses if not m.listed]
    lists = [m for m in masses if m.listed and len(m.log)]
    if lists:
        log, out, into = (
            torch.cat(each)
            for each in zip(
                *((m.log, m.out, m.into.expand(m.out.shape)) for m in lists), strict=True
            )
        )
        matrices.append(Masses(log, out, into))
    return matrices


# -- components ------------------------------------------------------------------------------------


class _Edges:
    """Which groups have an edge to or from some of others."""

    def __init__(self, masses: Masses, there: Tensor) -> None:
        self.there, self.out, self.into = there, masses.out, masses.into
        self.listed = masses.listed
        # A product with a matrix of float32 is the fastest way through it.
        self.matrix = None if self.listed else there.float()

    def ends(self, begin: Tensor) -> Tensor:
        """Groups that an edge from those in ``begin`` ends at, with repetitions."""
        if self.matrix is None:
            return self.out[self.there & begin[self.into]]
        return self.out[:, 0][(self.matrix @ begin[self.into[0]].float()) > 0]

    def begins(self, end: Tensor) -> Tensor:
        """Groups that an edge to those in ``end`` begins at, with repetitions."""
        if self.matrix is None:
            return self.into[self.there & end[self.out]]
        return self.into[0][(end[self.out[:, 0]].float() @ self.matrix) > 0]


def _components(edges: Sequence[_Edges], groups: int) -> Tensor:
    """Number of each group's strongly connected component; the one of group 0 has number 0."""
    forward = _reached([edge.ends for edge in edges], groups)
    backward = _reached([edge.begins for edge in reversed(edges)], groups)
    main = forward & backward
    component = torch.arange(groups)
    component[main] = 0
    rest = ~main
    while bool(rest.any()):  # what nothing enters, or leaves, is alone
        entered, left = torch.zeros_like(rest), torch.zeros_like(rest)
        for edge in edges:
            entered[edge.ends(rest)] = True
            left[edge.begins(rest)] = True
        alone = rest & ~(entered & left)
        if not bool(alone.any()):
            break
        rest &= ~alone
    if bool(rest.any()):
        graph: nx.DiGraph[int] = nx.DiGraph()
        for edge in edges:
            both = edge.there & rest[edge.out] & rest[edge.into]
            ends = torch.broadcast_tensors(edge.into, edge.out)
            graph.add_edges_from(torch.stack([each[both] for each in ends], 1).tolist())
        for found in nx.strongly_connected_components(graph):
            component[list(found)] = min(found)
    return component


def _reached(steps: Sequence[Callable[[Tensor], Tensor]], groups: int) -> Tensor:
    """Groups that steps lead to from group 0, itself included."""
    reached = torch.arange(groups) == 0
    count = 0
    while count != int(reached.sum()):
        count = int(reached.sum())
        for step in steps:
            reached[step(reached)] = True
    return reached


# -- the minimum -----------------------------------------------------------------------------------


class _State:
    """Masses at some factors, divided by powers of their ends' largest ones, so that all fit.

    Attributes:
        value: logarithm of f.
        ratio: half the logarithm of the mass out of each group over the mass into it.
        gap: largest difference of the two, relative to their sum.
    """

    def __init__(self, masses: Sequence[Masses], logs: Tensor) -> None:
        self.masses = masses
        moved = [m.log + 2 * (logs[m.out] - logs[m.into]) for m in masses]
        top = torch.full_like(logs, -torch.inf)
        for m, log in zip(masses, moved, strict=True):
            _largest(top, m.out, log.amax(1, keepdim=True))
            _largest(top, m.into, log if m.listed else log.amax(0, keepdim=True))
        #: Groups without an edge have nothing to balance.
        self.there = top > -torch.inf
        top = torch.where(self.there, top, 0.0)
        most = top[self.there].amax() if bool(self.there.any()) else top.new_zeros(())
        half = top / 2
        self.parts = [
            log.sub_(half[m.out]).sub_(half[m.into]).exp_()
            for m, log in zip(masses, moved, strict=True)
        ]
        size = (half - most / 2).exp()
        least = torch.finfo(logs.dtype).tiny
        into, out = self.times(size) / size, self.transposed(size) / size
        self.value = float(most) + float((into * size * size).sum().log())
        into, out = into.clamp(min=least), out.clamp(min=least)
        total = torch.where(self.there, into + out, 1.0)
        gaps = torch.where(self.there, out - into, 0.0) / total
        gaps[0] = 0
        self.gap = float(gaps.abs().amax())
        self.ratio = torch.where(self.there, (out / into).log() / 2, 0.0)
        self.ratio[0] = 0
        self.root = total.sqrt()
        self.weight = size * self.root

    def times(self, x: Tensor) -> Tensor:
        """The parts, as one matrix, times a vector over groups."""
        return times(self.masses, self.parts, x)

    def transposed(self, x: Tensor) -> Tensor:
        """The transpose of the same."""
        return transposed(self.masses, self.parts, x)

    def newton(self) -> Tensor:
        """A step of Newton in the ratios.

        The Hessian of f is 4 times the Laplacian of the masses D - M - M^T, with the sums D of what
        enters and leaves.  The gradient 2 (in - out) of a group is -2 D tanh(ratio): without the
        hyperbolic tangent the step is the same near the minimum, and the right one of a group by
        itself from anywhere.  Solved by conjugate gradients in coordinates where D is 1.
        """
        ratio = torch.where(self.ratio.abs() > TOLERANCE / 100, self.ratio, 0.0)
        residual = self.weight * ratio / 2
        step = torch.zeros_like(residual)
        direction, square = residual, float(residual @ residual)
        goal = min(0.1, float(ratio.abs().amax())) * float(ratio.abs().amax()) / 2
        for _ in range(SOLVES):
            if square == 0 or float((residual / self.weight).abs().amax()) <= goal:
                break
            scaled = direction / self.root
            mapped = direction - (self.times(scaled) + self.transposed(scaled)) / self.root
            mapped[0] = 0
            curvature = float(direction @ mapped)
            if curvature <= 0:  # the gauge of a component, down to rounding
                break
            length = square / curvature
            step = step + length * direction
            residual = residual - length * mapped
            before, square = square, float(residual @ residual)
            direction = residual + (square / before) * direction
        return step / self.weight


def _largest(top: Tensor, groups: Tensor, values: Tensor) -> None:
    top.scatter_reduce_(0, groups.reshape(-1), values.reshape(-1), "amax")


def _minimum(masses: Sequence[Masses], groups: int) -> Tensor:
    """Factors of least f, from descent and Newton's method."""
    logs = torch.zeros(groups, dtype=torch.float64)
    state = _State(masses, logs)
    for step in range(STEPS):
        if state.gap <= TOLERANCE:
            return logs
        if step >= DESCENT:
            found = _searched(masses, logs, state)
            if found is not None:
                logs, state = found
                continue
        # By exp(x - y) <= (exp(2 x) + exp(-2 y)) / 2 half of each group's own best step, all at
        # once, cannot raise f.
        logs = logs + state.ratio / 4
        state = _State(masses, logs)
    raise FloatingPointError(
        f"after {STEPS} steps the squares into and out of some channels still differ by "
        f"{state.gap:.1e} of their sum: the weights span more than float64 holds"
    )


def _searched(
    masses: Sequence[Masses], logs: Tensor, state: _State
) -> tuple[Tensor, _State] | None:
    """Newton's step, or a part of it that lowers f; ``None`` if a sixteenth does not."""
    step = state.newton()
    for halvings in range(5):
        moved = logs + step / 2**halvings
        found = _State(masses, moved)
        # Down to rounding: groups that are small against f do not show in it.
        if found.value <= state.value + 1e-13 * max(1.0, abs(state.value)):
            return moved, found
    return None


# -- between components ----------------------------------------------------------------------------


def bounded(masses: Sequence[Masses], found: Balance) -> Tensor:
    """Factors with which no edge between two components is larger than it was, ``[groups]``.

    Components that group 0 reaches may be made smaller for that, and others, larger.
    """
    logs, component = found.logs, found.component
    pairs = []
    for each in masses:
        between = (each.log > -torch.inf) & (component[each.out] != component[each.into])
        ends = torch.broadcast_tensors(each.into, each.out)
        pairs.append(torch.stack([end[between] for end in ends]))
    begin, end = torch.cat(pairs, 1) if pairs else torch.zeros(2, 0, dtype=torch.int64)
    grown = logs[end] - logs[begin]
    begin, end = component[begin], component[end]
    reached = torch.zeros(len(logs), dtype=torch.bool)
    reached[0] = True
    moved = torch.zeros_like(logs)
    while not bool(reached[end[reached[begin]]].all()):
        reached[end[reached[begin]]] = True
    below, above = reached[begin], ~reached[begin]
    while True:  # components have no cycles: this ends
        before = moved
        down = moved[begin[below]] - grown[below]
        moved = moved.scatter_reduce(0, end[below], down, "amin")
        up = moved[end[above]] + grown[above]
        moved = moved.scatter_reduce(0, begin[above], up, "amax")
        if torch.equal(moved, before):
            return logs + moved[component]
