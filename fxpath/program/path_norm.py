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
from fxpath.graph.interpret import Interpretation, power
from fxpath.graph.schema import arguments
from fxpath.program import adjoints
from fxpath.program.kernels.scales import times

__all__ = ["PathNorm", "Scaled", "Total", "Watch"]


@dataclass(frozen=True)
class Scaled:
    """The tensor ``mantissa * 2 ** scale[0]``; scales are 1-d float64 tensors on the CPU."""

    mantissa: Tensor
    scale: Tensor


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

    def is_activation(self, value: Any) -> bool:
        return isinstance(value, Scaled)

    # -- weights ----------------------------------------------------------------------------------

    def power(self, value: Tensor) -> Tensor:
        """``|value| ** q`` in the number format of this run."""
        if self.live:
            return power(value.to(self.dtype), self.q)
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
            return self.power(value)
        if name in self._led:
            leaf = self.power(value)
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

    def coefficient(self, value: Tensor) -> Tensor:
        """Coefficients of the architecture."""
        return self.power(value)

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

    def _filled(self, shape: Sequence[int], value: float) -> Tensor:
        filled: Tensor = adjoints.run.filled(list(shape), value, self.dtype, self.device)
        return filled

    def _weighed(self, mantissa: Tensor, scale: Tensor) -> Scaled:
        """A new weighted sum; where only biases are added next, the scale is taken after them."""
        value = Scaled(mantissa, scale)
        if all(user.target in (ops.shift, ops.affine) for user in self.node.users):
            return value
        return self.settle([value])

    def source(self, shape: list[int]) -> Scaled:
        return self._unscaled(self._filled(shape, 1.0))

    def constant(self, bias: Tensor) -> Scaled:
        return self.settle([self._unscaled(bias)])

    def window(
        self,
        x: Scaled,
        weight: Tensor | Streamed,
        matrices: Sequence[Tensor | None],
        extents: Sequence[int],
        groups: int,
    ) -> Scaled:
        if isinstance(weight, Streamed):
            y = adjoints.Window.apply(
                *(self.anchor, x.mantissa, weight.value, self._scores_of(weight)),
                *(matrices, extents, groups, self.q, self.generated),
            )
        else:
            y = ops.window(x.mantissa, weight, matrices, extents, groups)
        return self._weighed(y, x.scale)

    def conv(self, x: Scaled, weight: Tensor, *spec: Any) -> Scaled:
        return self._weighed(ops.conv(x.mantissa, weight, *spec), x.scale)

    def linear(self, x: Scaled, weight: Tensor | Streamed) -> Scaled:
        if isinstance(weight, Streamed):
            y = adjoints.Dense.apply(
                *(self.anchor, x.mantissa, weight.value, self._scores_of(weight)),
                *(self.q, self.generated),
            )
        else:
            y = ops.linear(x.mantissa, weight)
        return self._weighed(y, x.scale)

    def _scores_of(self, weight: Streamed) -> Tensor | None:
        return None if self.scores is None else self.scores[weight.name]

    def matmul(self, x: Scaled, weight: Tensor, weight_first: bool) -> Scaled:
        return self._weighed(ops.matmul(x.mantissa, weight, weight_first), x.scale)

    def einsum(self, x: Scaled, weight: Tensor, equation: str) -> Scaled:
        return self._weighed(ops.einsum(x.mantissa, weight, equation), x.scale)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight if self.live else adjoints.Scaled.apply(x, weight)

    def scale(self, x: Scaled | Tensor, weight: Tensor) -> Scaled | Tensor:
        if isinstance(x, Tensor):  # a coefficient in front of a weight
            return self._product(x, weight)
        return self._weighed(self._product(x.mantissa, weight), x.scale)

    def shift(self, x: Scaled, bias: Tensor) -> Scaled:
        return self.settle([x, self._unscaled(bias)])

    def affine(self, x: Scaled, weight: Tensor, bias: Tensor, axis: int) -> Scaled:
        return self.settle([x, self._unscaled(bias)], weight=weight, axis=axis)

    def slope(self, x: Scaled, a: Tensor | float) -> Scaled:
        if not isinstance(a, Tensor):
            factor = max(1.0, abs(a)) ** self.q
            return x if factor == 1 else Scaled(x.mantissa * factor, x.scale)
        factors = a.to(self.dtype).abs().clamp(min=1) ** self.q
        return self.settle([Scaled(x.mantissa * factors, x.scale)])

    def along(self, x: Scaled, dim: int, index: Tensor, weight: Tensor) -> Scaled:
        return Scaled(ops.along(x.mantissa, dim, index, power(weight, self.q)), x.scale)

    def pool(
        self, x: Scaled, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]
    ) -> Scaled:
        return self.along(x, dim, index, weight)

    def mix(self, x: Scaled | Tensor, dim: int, matrix: Tensor) -> Scaled | Tensor:
        if isinstance(x, Scaled):
            return Scaled(self._mixed(x.mantissa, dim, matrix), x.scale)
        return self._mixed(x, dim, matrix)  # a bias

    def _mixed(self, x: Tensor, dim: int, matrix: Tensor) -> Tensor:
        return ops.mix(x, dim, matrix) if self.live else adjoints.Mix.apply(x, dim, matrix)

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        return self.settle([x, y])

    def maximum(self, x: Scaled, y: Scaled) -> Scaled:
        return self.add(x, y)

    def clamp(self, x: Scaled, lo: float | None, hi: float | None) -> Scaled:
        bounds = sum(b**self.q for b in ops.bound_sizes(lo, hi) if b)
        return self.shift(x, self._filled([], float(bounds)))

    def move(self, target: Callable[..., Tensor], *args: Any) -> Scaled:
        if isinstance(args[0], Scaled):
            return Scaled(target(args[0].mantissa, *args[1:]), args[0].scale)
        pieces: list[Scaled] = list(args[0])
        return self.settle(pieces, int(args[1]) % pieces[0].mantissa.dim())

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
    return {
        node
        for node in coordinates
        if len(node.users) == 1
        and next(iter(node.users)).target in (ops.linear, ops.window)
        and uses[arguments(node)[1]] == 1
    }
