"""PathProgram: a captured and rewritten model, evaluated on its live parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath import ops
from fxpath.capture import Captured, Given, Model, check_finite
from fxpath.evaluate import Compiled, Run, coordinates, evaluate, score_shapes
from fxpath.front import take_in
from fxpath.interpret import PathNorm, Total
from fxpath.kernels.scales import MASS, SMALLEST, least
from fxpath.modes import plain_mode
from fxpath.passes.lower import lower
from fxpath.passes.reduce import reduce
from fxpath.passes.unsign import unsign
from fxpath.schema import arguments
from fxpath.sizes import SizeRow, sizes

__all__ = ["Evaluation", "PathProgram", "build"]


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
        signed: the network as the rules write it, with activations and signs.
        lifted: what path mass depends on, at full resolution, before the spatial reduction.
        reduced: the same after it, before each layer is lowered to what computes it fastest.
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
        signed: fx.GraphModule,
        dtype: torch.dtype,
        q: float,
        compiled: bool = False,
        reduced: bool = True,
    ) -> None:
        """Programs are made by :func:`fxpath.compile`."""
        self.captured = captured
        self.signed = signed
        self.lifted = unsign(signed)
        self.reduced = reduce(self.lifted, q) if reduced else self.lifted
        self.graph_module = lower(self.reduced)
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
            norm = PathNorm(self.graph_module, dtype, self.q)
            total: Total = norm.run(self.captured.live(), live=True)
            run = Run(total, least(norm.watch.scales), None)
            if self._healthy(dtype, run):
                return total.log() / (self.q or 1)
        raise self._failure()

    def scores(self, out: MutableMapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Shares Path-Mag / path-norm of every coordinate of theta.

        Args:
            out: tensors to write into, one for every score, of its shape and of a floating dtype.

        Returns:
            Parameter name -> tensor of the parameter's shape, entries in [0, 1] (unless an entry is
            used twice on a path); ``out`` itself holds the tensors if it was given.

        Raises:
            ValueError: if ``out`` has other names or shapes than the scores, or integers.
        """
        if out is None:
            return self.evaluate(scores=True).shares
        _check_buffers(out, score_shapes(self.graph_module))
        shares = self.evaluate(scores=True, out=out).shares
        for name, share in shares.items():
            if share is not out[name]:
                with torch.no_grad():
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
        reduced = self.reduced is not self.lifted
        return PathProgram(self.captured, self.signed, self.dtype, exponent, reduced=reduced)

    def sizes(self) -> list[SizeRow]:
        """Extents and multiply-adds of each activation, at full resolution and as kept."""
        return sizes(self.lifted, self.reduced)

    @plain_mode()
    def evaluate(
        self, scores: bool, sparsity: bool = False, out: Mapping[str, Tensor] | None = None
    ) -> Evaluation:
        """Run in the program's number format, or in float64 where it does not suffice.

        Args:
            scores: whether to differentiate.
            sparsity: whether to count the zeros of theta.
            out: tensors that are used for the scores, where they have the right form.

        Raises:
            ValueError: for a NaN or infinite parameter, by name.
            FloatingPointError: if float64 does not suffice either.
        """
        live = self.captured.live()
        for dtype in self._formats():
            shares = self._buffers(dtype, live, out or {}) if scores else None
            if self._compiled is not None and dtype == self.dtype:
                run = self._compiled(live, shares)
            else:
                run = evaluate(PathNorm(self.graph_module, dtype, self.q), live, shares)
            if self._healthy(dtype, run):
                zeros = self._sparsity(live) if sparsity else {}
                mantissa, exponent = run.total.mantissa.item(), int(run.total.scale[0])
                found = {name: share.to(self.dtype) for name, share in (shares or {}).items()}
                return Evaluation(mantissa, exponent, found, zeros, self.q)
        raise self._failure()

    def _buffers(
        self, dtype: torch.dtype, live: Mapping[str, Tensor], out: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Memory for the scores: the caller's own where it can be written as it is."""
        device = next((t.device for t in live.values()), torch.device("cpu"))
        return {
            name: out[name]
            if name in out and _writable(out[name], dtype, device)
            else torch.empty(shape, dtype=dtype, device=device)
            for name, shape in score_shapes(self.graph_module).items()
        }

    def _sparsity(self, live: Mapping[str, Tensor]) -> dict[str, float]:
        """Fraction of zero entries of each coordinate array, at its first use."""
        found: dict[str, float] = {}
        for name, value in coordinates(self.lifted, live):
            zeros = 1 - int(torch.count_nonzero(value)) / max(1, value.numel())
            found.setdefault(name, zeros)
        return found

    # -- number formats ---------------------------------------------------------------------------

    def _formats(self) -> tuple[torch.dtype, ...]:
        return (self.dtype,) if self.dtype == torch.float64 else (self.dtype, torch.float64)

    def _healthy(self, dtype: torch.dtype, run: Run) -> bool:
        """Whether nothing over- or underflowed that exact arithmetic would have kept."""
        if not math.isfinite(run.total.mantissa.item()):
            return False
        if run.total.mantissa.item() == 0:
            return self._has_no_path()
        if run.mass is not None:
            return run.mass.item() <= MASS[dtype]
        if run.smallest.item() >= SMALLEST[dtype]:
            return True
        # Some entry is small or zero: the gradient tells whether it matters.
        live = self.captured.live()
        norm = PathNorm(self.graph_module, dtype, self.q)
        checked = evaluate(norm, live, self._buffers(dtype, live, {}))
        assert checked.mass is not None
        return checked.mass.item() <= MASS[dtype]

    def _has_no_path(self) -> bool:
        """Whether the norm is zero, by counting paths, which cannot underflow."""
        norm = PathNorm(self.graph_module, torch.float64, 0.0)
        return evaluate(norm, self.captured.live(), None).total.mantissa.item() == 0

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
    given: Given,
    q: float = 1.0,
    dtype: torch.dtype | None = None,
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
    captured, signed = take_in(model, given)
    live = captured.live()
    check_finite({captured.tensors[placeholder]: tensor for placeholder, tensor in live.items()})
    if dtype is None:
        double = any(tensor.dtype == torch.float64 for tensor in live.values())
        dtype = torch.float64 if double else torch.float32
    return PathProgram(captured, signed, dtype, exponent, compiled, reduced)


def _exponent(q: float) -> float:
    if not 0 <= q < math.inf:
        raise ValueError(f"q = {q}: the exponent must be a finite number >= 0")
    return float(q)


def _writable(out: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return (
        out.dtype == dtype
        and out.device == device
        and out.is_contiguous()
        and not out.requires_grad
        and not out.is_inference()
    )


def _check_buffers(out: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if out.keys() != shapes.keys():
        difference = sorted(out.keys() ^ shapes.keys())
        raise ValueError(f"out must have one tensor for each score; differs in {difference}")
    for name, shape in shapes.items():
        if out[name].shape != shape:
            raise ValueError(f"out[{name!r}] has shape {tuple(out[name].shape)}, its score {shape}")
        if not out[name].is_floating_point():
            raise ValueError(f"out[{name!r}] holds {out[name].dtype}, which has no shares below 1")
