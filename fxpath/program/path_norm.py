"""The path-norm of a lifted graph, with a running power-of-two scale in every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.equations import letters
from fxpath.graph.interpret import Interpretation, Weighing
from fxpath.graph.schema import arguments, bias_of
from fxpath.program import adjoints
from fxpath.program.kernels.scales import times


@dataclass(frozen=True)
class Scaled:
    """The tensor ``mantissa * 2 ** scale[0]``; scales are 1-d float64 tensors on the CPU."""

    mantissa: Tensor
    scale: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Scaled:
        """Apply a linear map."""
        return Scaled(function(self.mantissa), self.scale)


@dataclass(frozen=True)
class Total:
    """``||Phi||_q^q = mantissa * 2 ** scale[0]``; float64 tensors on the CPU."""

    mantissa: Tensor
    scale: Tensor

    def log(self) -> Tensor:
        """Natural logarithm, 0-d float64; -inf with gradient 0 where the norm is 0."""
        # The logarithm of 0 is replaced before it is taken, so that its gradient is not NaN.
        empty = self.mantissa == 0
        log = torch.where(empty, torch.ones_like(self.mantissa), self.mantissa).log()
        log = log + self.scale[0] * math.log(2)
        return torch.where(empty, torch.full_like(log, -math.inf), log)


@dataclass(frozen=True)
class Streamed:
    """Entries of theta that the one operation that reads them lifts block by block."""

    value: Tensor
    name: str


@dataclass(frozen=True)
class Factored:
    """A weight whose factors are multiplied with what it makes instead."""

    weight: Tensor | Streamed
    factor: Tensor


@dataclass
class Watch:
    """What a run saw of its own range, to tell whether a number format sufficed.

    A sum of products loses at most its number of terms times the format's smallest number t to
    underflow.  Without gradients this is harmless where the smallest entry of every tensor (kept in
    ``scales``) is far above t.  With gradients it is harmless where t times the sum of the gradient
    (``masses``), which is the part of the path-norm that may be lost, is far below 1: small or zero
    entries that nothing blows up again do not count.
    """

    scales: list[Tensor] = field(default_factory=list)
    masses: list[Tensor] = field(default_factory=list)


class PathNorm(Interpretation):
    """||Phi(theta)||_q^q, with a running power-of-two scale in every tensor.

    The scales are constants for differentiation.  Three kinds of runs:

    - ``live``: plain differentiable tensors all the way to the model's parameters;
    - with ``scores``: entries of theta are leaves, and what becomes of ``scores`` once the total is
      differentiated are the shares (14): see :meth:`leaves`;
    - neither: the norm alone.

    Attributes:
        generated: whether large weights that meet one vector may run through generated code.
    """

    activation = Scaled
    generated = False

    def run(
        self,
        tensors: Mapping[str, Tensor],
        scores: Mapping[str, Tensor] | None = None,
        live: bool = False,
    ) -> Any:
        """Evaluate; see :class:`Interpretation`.

        Args:
            tensors: the model's tensors by the names of the graph's placeholders.
            scores: for every coordinate of theta a tensor of this run's number format.
            live: whether to keep the tensors' own autograd history.
        """
        self.live, self.scores = live, scores
        self.watch = Watch()
        self.leaves: list[tuple[str, Tensor, bool]] = []
        self._led: set[str] = set()  # names that have a leaf
        self.anchor = adjoints.run.filled([], 0.0, self.dtype, torch.device("cpu"))
        self.anchor.requires_grad_(scores is not None)
        self._zero = torch.zeros(1, dtype=torch.float64)
        self._streamed = set() if live else _streamable(self.module.graph)
        return super().run(tensors)

    # -- weights ----------------------------------------------------------------------------------

    def lifted(self, value: Tensor) -> Tensor:
        if self.live:
            return super().lifted(value)
        lifted: Tensor = adjoints.run.lifted(value, self.dtype, self.q)
        return lifted

    def normalizer(self, gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
        return (ops if self.live else adjoints.run).normalizer(gamma, var, eps)

    def folded_bias(
        self, bias: Tensor | None, factor: Tensor, beta: Tensor | None, mean: Tensor
    ) -> Tensor:
        return (ops if self.live else adjoints.run).folded_bias(bias, factor, beta, mean)

    def coordinate(self, value: Tensor, name: str) -> Tensor | Streamed:
        """Entries of theta: a leaf of its own for each use, or left to the operation that reads."""
        converted = self._is_converted(value)
        if converted:
            scale, mass = adjoints.run.lift_loss(value.detach(), self.dtype)
            self.watch.scales.append(scale)
        if self.node in self._streamed:
            if converted:
                self.watch.masses.append(mass)  # its gradient is seen by nobody
            return Streamed(value, name)
        if self.scores is None:
            return self.lifted(value)
        if name in self._led:
            leaf = self.lifted(value)
        else:
            self._led.add(name)
            # The first use keeps its leaf where its scores will be.
            adjoints.run.lift_(self.scores[name], value, self.q)
            leaf = self.scores[name]
        leaf = leaf.detach().requires_grad_()
        self.leaves.append((name, leaf, converted))
        return leaf

    def _is_converted(self, value: Tensor) -> bool:
        """Whether a weight comes in float64, and may lose digits; what is added loses none."""
        bias = getattr(self.node.args[0], "target", None) is ops.folded_bias
        return value.dtype == torch.float64 != self.dtype and not bias

    # -- activations ------------------------------------------------------------------------------

    def settle(
        self,
        values: Sequence[Scaled],
        dim: int | None = None,
        weight: Tensor | None = None,
        axis: int = 0,
    ) -> Scaled:
        """Bring values to a common scale, their largest entry near 1, and add or join them.

        ``weight``, coefficients along ``axis``, is multiplied with the first one.
        """
        scales, mantissas = [v.scale for v in values], [v.mantissa for v in values]
        if self.live:
            detached = [m.detach() for m in mantissas]
            fixed = None if weight is None else weight.detach()
            _, scale = adjoints.run.settle(detached, scales, fixed, axis, dim)
            if weight is not None:
                mantissas[0] = mantissas[0] * ops.beside(weight, mantissas[0], axis)
            terms = [times(m, int(e)) for m, e in zip(mantissas, scale[2:], strict=True)]
            settled = sum(terms[1:], terms[0]) if dim is None else torch.cat(terms, dim)
        else:
            masses = self.watch.masses
            settled, scale = adjoints.Settle.apply(masses, scales, weight, axis, dim, *mantissas)
        self.watch.scales.append(scale)
        return Scaled(settled, scale)

    def _unscaled(self, value: Tensor) -> Scaled:
        return Scaled(value, self._zero)

    def filled(self, shape: Sequence[int], value: float) -> Tensor:
        filled: Tensor = adjoints.run.filled(list(shape), value, self.dtype, self.device)
        return filled

    def source(self, shape: Sequence[int]) -> Scaled:
        return self._unscaled(self.filled(shape, 1.0))

    def constant(self, bias: Tensor) -> Scaled:
        return self.settle([self._unscaled(bias)])

    def weigh(
        self,
        x: Scaled,
        weight: Tensor | Streamed | Factored,
        bias: Tensor | None,
        run: Weighing,
    ) -> Scaled:
        factor = None
        if isinstance(weight, Factored):
            factor = weight.factor
            weight = weight.weight
        if isinstance(weight, Streamed):
            streamed = adjoints.Window if run.operation is ops.window else adjoints.Dense
            scores = None if self.scores is None else self.scores[weight.name]
            spec = run.spec if run.operation is ops.window else ()
            y = streamed.apply(
                *(self.anchor, x.mantissa, weight.value, scores, *spec, self.q, self.generated)
            )
        elif run.operation is ops.scale:
            y = self.times(x.mantissa, weight)
        else:
            y = run(x.mantissa, weight)
        terms = [Scaled(y, x.scale)] if bias is None else [Scaled(y, x.scale), self._unscaled(bias)]
        return self.settle(terms, weight=factor, axis=1)

    def factored(self, weight: Tensor | Streamed, factor: Tensor) -> Factored:
        return Factored(weight, factor)

    def times(self, weight: Tensor, factor: Tensor) -> Tensor:
        product: Tensor = weight * factor if self.live else adjoints.Scaled.apply(weight, factor)
        return product

    def shift(self, x: Scaled, bias: Tensor) -> Scaled:
        return self.settle([x, self._unscaled(bias)])

    def slope(self, x: Scaled, a: Tensor | float) -> Scaled:
        y: Scaled = super().slope(x, a)
        return self.settle([y]) if isinstance(a, Tensor) else y

    def mix(self, x: Scaled | Tensor, dim: int, matrix: Tensor) -> Scaled | Tensor:
        run = ops.mix if self.live else adjoints.Mix.apply
        mixed: Scaled | Tensor = self.fixed(x, lambda value: run(value, dim, matrix))
        return mixed

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        return self.settle([x, y])

    def join(self, pieces: list[Scaled], dim: int) -> Scaled:
        return self.settle(pieces, dim)

    def total(self, outputs: list[Scaled]) -> Total:
        """The sum over all output neurons."""
        mantissas, scales = [x.mantissa for x in outputs], [x.scale for x in outputs]
        if not self.live:
            return Total(*adjoints.Sum.apply(scales, *mantissas))
        _, scale = adjoints.run.total([m.detach() for m in mantissas], scales)
        sums = [
            times(m.double().sum().cpu(), int(e)) for m, e in zip(mantissas, scale[2:], strict=True)
        ]
        return Total(sum(sums[1:], sums[0]), scale)


def _streamable(graph: fx.Graph) -> set[fx.Node]:
    """Coordinates that one linear map or window alone reads, and that have their name alone."""
    coordinates = [node for node in graph.nodes if node.target is ops.coordinate]
    uses = Counter(arguments(node)[1] for node in coordinates)
    return {node for node in coordinates if uses[arguments(node)[1]] == 1 and _streams(node)}


def _streams(weight: fx.Node) -> bool:
    """Whether the one operation that reads a weight lifts it block by block."""
    if len(weight.users) != 1:
        return False
    (reader,) = weight.users
    if reader.target is ops.factored:
        return _streams(reader)
    if bias_of(reader) is weight:
        return False
    dense = reader.target is ops.contract and letters(arguments(reader)[3]).dense
    return dense or reader.target is ops.window
