"""The path-lifting itself, by listing paths: for teaching and tests, on small networks.

Everything else in this package is about never having to form this vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.graph import ops
from fxpath.graph.edit import form
from fxpath.graph.schema import arguments
from fxpath.model import Captured, Given, Model, Shapes, check_finite
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.passes import Setting, take_in
from fxpath.passes.reduce import reduce
from fxpath.paths.dag import Dag, Entry, followed
from fxpath.paths.expand import expand
from fxpath.program.flat import Flat


@dataclass(frozen=True)
class Path:
    """A path of Def. A.3 that ends at an output.

    Attributes:
        neurons: from its first to its last, e.g. ``("x[0]", "linear[1]", "relu[1]")``: operation of
            the exported graph, and position.
        entries: entries of theta that Phi multiplies along it, as (parameter, index): the bias of
            its first neuron, unless that is an input, and the weights of its edges.  Coefficients
            of the architecture are not listed.
        output: position of its last neuron among all output entries.
    """

    neurons: tuple[str, ...]
    entries: tuple[Entry, ...]
    output: int

    def __str__(self) -> str:
        return " -> ".join(self.neurons)


@dataclass(frozen=True, eq=False)
class PathLifting:
    """Phi(theta) and, for one input x, A(theta, x) (Def. A.5).

    Attributes:
        phi: Phi(theta) with signs, float64 ``[paths]``; models of one architecture list their paths
            in the same order, whatever the parameters are.
        outputs: for each path the position of its last neuron among all output entries, int64.
        starts: for each path the position of its first neuron among all input entries, or the
            number of inputs for a path that starts at a bias: its column of A; int64.
        activity: for each path its activation a_p(theta, x), float64; ``None`` without an x.  It is
            0 or 1 for ReLU and max-pooling, also -1 for an absolute value; for a slope a it is 1 or
            a, divided by the factor ``max(1, |a|)`` that Phi holds.
        inputs: number of input entries.
    """

    phi: Tensor
    outputs: Tensor
    starts: Tensor
    activity: Tensor | None
    inputs: int
    _dag: Dag
    _edges: Tensor
    _first: Tensor
    _x: Tensor | None

    def __len__(self) -> int:
        return len(self.phi)

    def __repr__(self) -> str:
        norm = float(self.phi.abs().sum())
        given = "" if self.activity is None else ", with activations"
        return f"<PathLifting: {len(self):,} paths, l^1 norm {norm:.6g}{given}>"

    @property
    def activations(self) -> Tensor:
        """A(theta, x), float64 ``[paths, inputs + 1]``; the last column is the bias's.

        Raises:
            ValueError: if no x was given.
        """
        if self.activity is None:
            raise ValueError("A(theta, x) needs an input: pass x= to path_lifting")
        matrix = torch.zeros(len(self), self.inputs + 1, dtype=torch.float64)
        matrix[torch.arange(len(self)), self.starts] = self.activity
        return matrix

    def realization(self) -> Tensor:
        """R_theta(x) = <Phi, A (x, 1)> (4), summed for each output: float64 ``[outputs]``.

        Raises:
            ValueError: if no x was given.
        """
        if self.activity is None or self._x is None:
            raise ValueError("R(x) needs an input: pass x= to path_lifting")
        extended = torch.cat([self._x, self._x.new_ones(1)])
        terms = self.phi * self.activity * extended[self.starts]
        return terms.new_zeros(len(self._dag.outputs)).index_add(0, self.outputs, terms)

    def path(self, i: int) -> Path:
        """The i-th path, as names.

        Args:
            i: its position in ``phi``.
        """
        edges = [e for e in self._edges[i].tolist() if e < len(self._dag.source)]
        end = int(self._dag.outputs[self.outputs[i]])
        neurons = [*(int(self._dag.source[e]) for e in edges), end]
        codes = [int(self._dag.bias_code[neurons[0]]), *(int(self._dag.code[e]) for e in edges)]
        return Path(
            tuple(map(self._dag.name, neurons)),
            tuple(self._dag.entry(code) for code in codes if code > 0),
            int(self.outputs[i]),
        )

    def through(self, name: str, index: Sequence[int]) -> Tensor:
        """Paths that an entry of theta takes part in, bool ``[paths]``.

        Without an entry that is used twice on a path, ``phi[through(...)].abs().sum()`` is its
        Path-Mag (10).

        Args:
            name: of a coordinate of theta, as in the scores of :func:`fxpath.analyze`.
            index: position in it.

        Raises:
            KeyError: if theta has no such entry.
        """
        code = self._dag.code_of(name, tuple(index))
        carried = torch.cat([self._dag.code == code, torch.zeros(1, dtype=torch.bool)])
        return carried[self._edges].any(1) | (self._dag.bias_code[self._first] == code)


@plain_mode()
@torch.no_grad()
def path_lifting(
    model: Model,
    input_shape: Shapes = None,
    *,
    x: Tensor | Sequence[Tensor] | None = None,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    limit: int = 100_000,
) -> PathLifting:
    """Phi(theta), one entry for each path, and A(theta, x) for one input (Def. A.5).

    Paths are listed one by one, so this is for networks of a few thousand weights.  Those that
    start at a neuron without a bias, whose entry is 0 for all parameters, are left out; a weight
    that is zero has its paths like any other.

    Args:
        model: as for :func:`fxpath.analyze`.
        input_shape: shape of the input without the batch axis; taken from ``x`` if that is given.
        x: one input without the batch axis, or one for each input of the model.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.
        limit: number of paths above which to refuse.

    Returns:
        A :class:`PathLifting`; its ``phi`` has the l^1 norm ``fxpath.path_norm(model)``.

    Raises:
        UnsupportedModelError: listing every operation outside the theory.
        ValueError: for more than ``limit`` paths, with their number; for an ``x`` of another shape;
            as :func:`fxpath.analyze`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> for parameter, values in zip(model.parameters(), ([3, -1], [2, 5], [7])):
        ...     _ = parameter.data.copy_(torch.tensor(values).view_as(parameter))
        >>> lifting = path_lifting(model, x=torch.tensor([10.0]))
        >>> lifting.phi.tolist(), lifting.path(0).entries
        ([7.0, 6.0, -5.0], (('2.bias', (0,)),))
        >>> lifting.path(1).entries
        (('0.weight', (0, 0)), ('2.weight', (0, 0)))
        >>> lifting.activations.tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
        >>> lifting.realization(), model(torch.tensor([10.0]))[0].item()
        (tensor([67.], dtype=torch.float64), 67.0)
    """
    xs = [] if x is None else [x] if isinstance(x, Tensor) else list(x)
    if xs and input_shape is None and example_inputs is None:
        input_shape = [tuple(each.shape) for each in xs]
    captured, lifted = take_in(
        model, Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    )
    live = captured.live()
    _check_count(_count(lifted, captured, live), limit)
    check_finite({captured.tensors[key]: tensor for key, tensor in live.items()})
    dag = expand(captured, lifted)
    _check_count(dag.count_paths(), limit)
    first, edges, ends = _enumerate(dag)
    phi = torch.where(first < dag.inputs, 1.0, dag.bias[first])
    phi = phi * torch.cat([dag.weight, dag.weight.new_ones(1)])[edges].prod(1)
    flat = torch.cat([each.detach().double().cpu().reshape(-1) for each in xs]) if xs else None
    activity = None
    if flat is not None:
        if len(flat) != dag.inputs:
            raise ValueError(f"x has {len(flat)} entries, and the network {dag.inputs} inputs")
        _, active = dag.values(flat)
        activity = torch.cat([active, active.new_ones(1)])[edges].prod(1)
    starts = first.clamp(max=dag.inputs)
    return PathLifting(phi, ends, starts, activity, dag.inputs, dag, edges, first, flat)


def _count(module: fx.GraphModule, captured: Captured, live: Mapping[str, Tensor]) -> int:
    """The number of paths: every coordinate counts as one, whether or not it is zero."""
    setting = Setting(captured, 0.0)
    reduced = reduce(module, setting)
    for node in reduced.graph.nodes:
        if node.target is ops.coordinate:
            one = torch.ones((), dtype=torch.float64).expand(node.meta["val"].shape)
            reduced.register_buffer(f"ones_{node.name}", one)
            with reduced.graph.inserting_before(node):
                ones = reduced.graph.get_attr(f"ones_{node.name}")
            ones.meta["val"] = form(one)
            node.args = ones, *arguments(node)[1:]
    run = Flat(reduced, setting).norm(live, torch.float64)
    return round(Fraction(run.mantissa) * Fraction(2) ** run.exponent)


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        number = f"{count:,}" if count < 10**15 else f"about 10^{len(str(count)) - 1}"
        raise ValueError(
            f"the network has {number} paths, more than limit={limit:,}: take a smaller one, or "
            "fxpath.path_norm, which does not list them"
        )


def _enumerate(dag: Dag) -> tuple[Tensor, Tensor, Tensor]:
    """All paths from their ends backwards.

    Returns:
        First neurons ``[paths]``; edges ``[paths, longest]``, filled up in front with the number of
        edges; outputs ``[paths]``.
    """
    order = torch.argsort(dag.target, stable=True)
    degree = torch.bincount(dag.target, minlength=len(dag.bias))
    first, outputs = dag.outputs, torch.arange(len(dag.outputs))
    edges = torch.zeros(len(first), 0, dtype=torch.int64)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(first):
        complete = (first < dag.inputs) | (dag.bias_code[first] >= 0)
        found.append((first[complete], edges[complete], outputs[complete]))
        parent, place = followed(degree, first)
        edge = order[place]
        edges = torch.cat([edge[:, None], edges[parent]], 1)
        first, outputs = dag.source[edge], outputs[parent]
    longest = max(each.shape[1] for _, each, _ in found)
    padded = [
        nn.functional.pad(each, (longest - each.shape[1], 0), value=len(order))
        for _, each, _ in found
    ]
    outputs = torch.cat([each for _, _, each in found])
    by_output = torch.argsort(outputs, stable=True)
    first = torch.cat([each for each, _, _ in found])[by_output]
    return first, torch.cat(padded)[by_output], outputs[by_output]
