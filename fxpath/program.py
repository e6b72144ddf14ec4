"""PathProgram: a captured and rewritten model, evaluated on its live parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpath import ops
from fxpath.capture import Captured, Model, capture, check_finite
from fxpath.evaluate import Compiled, Run, evaluate
from fxpath.interpret import PathNorm, Support, Total
from fxpath.modes import plain_mode
from fxpath.passes.fold import fold_batch_norm
from fxpath.passes.lift import lift
from fxpath.passes.reduce import reduce
from fxpath.schema import arguments
from fxpath.sizes import SizeRow, sizes

__all__ = ["Evaluation", "PathProgram", "build"]

#: Entries of one tensor that are this much smaller than its largest one are trusted to the format.
SPAN = {torch.float32: 1e-30, torch.float64: 1e-290}


@dataclass(frozen=True)
class Evaluation:
    """What one run found.

    ``||Phi||_q^q = mantissa * 2 ** exponent``; ``shares`` and the ``sparsity`` of each coordinate
    array are keyed by name.
    """

    mantissa: float
    exponent: int
    shares: dict[str, Tensor]
    sparsity: dict[str, float]
    q: float

    @property
    def mass(self) -> float:
        """``||Phi||_q^q``; inf beyond float64."""
        try:
            return math.ldexp(self.mantissa, self.exponent)
        except OverflowError:
            return math.inf

    @property
    def log10_mass(self) -> float:
        """Decimal logarithm of ``||Phi||_q^q``."""
        if self.mantissa == 0:
            return -math.inf
        return math.log10(self.mantissa) + self.exponent * math.log10(2)

    @property
    def path_norm(self) -> float:
        """``||Phi||_q``; inf beyond float64."""
        if self.q in (0, 1):
            return self.mass
        if self.mantissa == 0:
            return 0.0
        # Part of the exponent is a multiple of q, so that the root fits where the mass does not.
        whole = math.floor(self.exponent / self.q)
        rest = self.exponent - whole * self.q
        try:
            return math.ldexp((self.mantissa * 2.0**rest) ** (1 / self.q), whole)
        except OverflowError:
            return math.inf

    @property
    def log10_path_norm(self) -> float:
        """Decimal logarithm of ``||Phi||_q``."""
        return self.log10_mass / (self.q or 1)


class PathProgram:
    """Path-norm and Path-Mag of one model, captured once and evaluated many times.

    The program reads the model's tensors anew at every call, so it follows training and pruning in
    place.  It is bound to the model's structure: after a parameter was replaced by another kind of
    thing (a new layer, a parametrization), compile again.

    Attributes:
        graph_module: the rewritten network, an FX graph module over the vocabulary of
            ``fxpath.ops``; it prints, lints, and called on the model's tensors returns the
            path-norm without care for range.
        lifted: the same at full resolution, before the spatial reduction.
        dtype: number format of the evaluation; float64 takes over where float32 cannot hold the
            span of one tensor.
        q: exponent of the path-norm.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> program = fxpath.compile(model, (2,))
        >>> program.path_norm()
        6.0
        >>> _ = model.weight.data.mul_(2)
        >>> program.path_norm()
        12.0
    """

    def __init__(
        self,
        captured: Captured,
        lifted: fx.GraphModule,
        dtype: torch.dtype,
        q: float,
        compiled: bool = False,
        reduced: bool = True,
    ) -> None:
        """Programs are made by :func:`fxpath.compile`."""
        self.captured = captured
        self.lifted = lifted
        self.reduced = reduced
        self.graph_module = reduce(lifted, q) if reduced else lifted
        self.dtype = dtype if q == 1 else torch.float64
        self.q = q
        self._compiled = Compiled(self.graph_module, self.dtype, q) if compiled else None

    # -- results ----------------------------------------------------------------------------------

    def path_norm(self) -> float:
        """``||Phi(theta)||_q``; for q = 0 the number of non-zero paths; inf only beyond float64."""
        return self.evaluate(scores=False).path_norm

    def log10_path_norm(self) -> float:
        """Decimal logarithm of the path-norm; -inf if it is 0."""
        return self.evaluate(scores=False).log10_path_norm

    @plain_mode()
    def log_path_norm(self) -> Tensor:
        """Natural logarithm of the path-norm, a 0-d float64 tensor that differentiates.

        Its gradient reaches the model's parameters: added to a training loss it is a regularizer
        that no rescaling of neurons changes.

        Raises:
            ValueError: for a NaN or infinite parameter, by name.
            FloatingPointError: if float64 does not suffice.
        """
        for dtype in self._formats():
            run = PathNorm(self.graph_module, dtype, self.q)
            total: Total = run.run(self.captured.live())
            if self._healthy(dtype, total, run.smallest(), run.zeros()):
                return total.log() / (self.q or 1)
        raise self._failure()

    def scores(self, out: MutableMapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Shares Path-Mag / path-norm of every coordinate of theta.

        Args:
            out: tensors to write into, one for every score, of its shape and dtype.

        Returns:
            Parameter name -> tensor of the parameter's shape, entries in [0, 1] (unless an entry is
            used twice on a path); ``out`` itself holds the tensors if it was given.

        Raises:
            ValueError: if ``out`` has other names or shapes than the scores.
        """
        shares = self.evaluate(scores=True).shares
        if out is None:
            return shares
        _check_buffers(out, shares)
        for name, share in shares.items():
            out[name].copy_(share)
        return dict(out)

    @plain_mode()
    def with_exponent(self, q: float) -> PathProgram:
        """The same rewritten model for another exponent.

        Args:
            q: a finite number >= 0.

        Raises:
            ValueError: for any other ``q``.
        """
        exponent = _exponent(q)
        return PathProgram(self.captured, self.lifted, self.dtype, exponent, reduced=self.reduced)

    def sizes(self) -> list[SizeRow]:
        """Extents and multiply-adds of each activation, at full resolution and as kept."""
        return sizes(self.lifted, self.graph_module)

    @plain_mode()
    def evaluate(self, scores: bool, sparsity: bool = False) -> Evaluation:
        """Run in the program's number format, or in float64 where it does not suffice.

        Args:
            scores: whether to differentiate.
            sparsity: whether to count the zeros of theta.

        Raises:
            ValueError: for a NaN or infinite parameter, by name.
            FloatingPointError: if float64 does not suffice either.
        """
        for dtype in self._formats():
            if self._compiled is not None and dtype == self.dtype:
                run = self._compiled(self.captured.live(), scores)
            else:
                run = evaluate(self.graph_module, self.captured.live(), dtype, self.q, scores)
            if self._healthy(dtype, run.total, run.smallest, run.zeros) and run.finite():
                zeros = self._sparsity(run) if sparsity else {}
                mantissa, exponent = run.total.mantissa.item(), int(run.total.exponent.item())
                return Evaluation(mantissa, exponent, run.shares, zeros, self.q)
        raise self._failure()

    def _sparsity(self, run: Run) -> dict[str, float]:
        """Fraction of zero entries of each coordinate array."""
        if not run.leaves:  # a compiled run keeps no weights
            run = evaluate(self.graph_module, self.captured.live(), self.dtype, self.q, False)
        return {
            name: 1 - int(torch.count_nonzero(uses[0])) / max(1, uses[0].numel())
            for name, uses in run.leaves.items()
        }

    # -- number formats ---------------------------------------------------------------------------

    def _formats(self) -> tuple[torch.dtype, ...]:
        return (self.dtype,) if self.dtype == torch.float64 else (self.dtype, torch.float64)

    def _healthy(self, dtype: torch.dtype, total: Total, smallest: Tensor, zeros: Tensor) -> bool:
        """Whether nothing over- or underflowed that exact arithmetic would have kept."""
        if not math.isfinite(total.mantissa.item()):
            return False
        if not smallest.item() >= SPAN[dtype]:
            return False
        if zeros.item() == 0:
            return True
        support = Support(self.graph_module, torch.float64, self.q)
        with torch.no_grad():
            support.run(self.captured.live())
        return support.zeros().item() == zeros.item()

    def _failure(self) -> Exception:
        live = self.captured.live()
        try:
            check_finite({self.captured.tensors[key]: value for key, value in live.items()})
        except ValueError as error:
            return error
        for node in self.lifted.graph.nodes:
            if node.target is ops.normalizer:
                _, variance, eps = arguments(node)
                if bool((live[variance.target] + eps <= 0).any()):
                    name = self.captured.tensors[variance.target]
                    return ValueError(f"{name} has entries that are no variance: not above {-eps}")
        return FloatingPointError(
            "some tensor of the lifted network spans more orders of magnitude than float64 holds: "
            "rescale the model's neurons, or look for entries near 1e-300 or 1e300"
        )


@plain_mode()
def build(
    model: Model,
    input_shape: Any = None,
    example_inputs: Any = None,
    q: float = 1.0,
    dtype: torch.dtype | None = None,
    until: str | None = None,
    compiled: bool = False,
    reduced: bool = True,
) -> PathProgram:
    """Capture and rewrite a model.

    Raises:
        ValueError: for a NaN or infinite parameter, a shape that cannot be inferred, q < 0.
        UnsupportedModelError: listing every operation without an exact rule.
    """
    exponent = _exponent(q)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"dtype={dtype}: path-norms are computed in torch.float32 or torch.float64"
        )
    captured = capture(model, input_shape, example_inputs, until)
    live = captured.live()
    fold_batch_norm(captured)
    module = lift(captured)
    check_finite({captured.tensors[placeholder]: tensor for placeholder, tensor in live.items()})
    if dtype is None:
        double = any(tensor.dtype == torch.float64 for tensor in live.values())
        dtype = torch.float64 if double else torch.float32
    return PathProgram(captured, module, dtype, exponent, compiled, reduced)


def _exponent(q: float) -> float:
    if not 0 <= q < math.inf:
        raise ValueError(f"q = {q}: the exponent must be a finite number >= 0")
    return float(q)


def _check_buffers(out: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> None:
    if out.keys() != shares.keys():
        difference = sorted(out.keys() ^ shares.keys())
        raise ValueError(f"out must have one tensor for each score; differs in {difference}")
    for name, share in shares.items():
        if out[name].shape != share.shape:
            raise ValueError(
                f"out[{name!r}] has shape {tuple(out[name].shape)}, its score {tuple(share.shape)}"
            )
