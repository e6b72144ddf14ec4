"""PathProgram: a captured and rewritten model, evaluated on its live parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fxpath.capture.gradients import own_gradients
from fxpath.certificate import Certificate
from fxpath.errors import SupportReport, UnsupportedModelError
from fxpath.gates import NO_CERTIFICATE, Gate
from fxpath.model import Captured, Given, Model, Shapes
from fxpath.modes import plain_mode
from fxpath.passes import Rewritten, Setting, rewrite, take_in
from fxpath.passes.derive import Ending, derive
from fxpath.program.artefact import exported
from fxpath.program.backends import check_backend
from fxpath.program.buffers import check_buffers, check_holds
from fxpath.program.evaluation import LEAST_EXPONENT, Evaluation
from fxpath.program.files import kind_of, write
from fxpath.program.flat import Flat
from fxpath.program.formats import check_format, format_of
from fxpath.program.gates import find_taken
from fxpath.program.gradient import log_of
from fxpath.program.record import record
from fxpath.program.runs import Runs
from fxpath.program.sizes import SizeRow, sizes
from fxpath.program.theta import score_shapes
from fxpath.sharding import check_alike, refuse_sharded


class PathProgram:
    """Path-norm and Path-Mag of one model, captured once and evaluated many times.

    The program reads the model's tensors anew at every call, so it follows training and pruning in
    place.  It is bound to what the graph was made for: modules with their configuration and hooks,
    which tensors are one, masks and lists of positions.  A change of these is an error that names
    it, and says to compile again.  Python numbers that the model's own code holds are not watched.

    It deep-copies and pickles as its model and what was asked of it: the copy is bound to the
    copied model, and captured anew.

    Attributes:
        graph_module: the rewritten network, an FX graph module over the vocabulary of
            ``fxpath.graph.ops``; it prints, lints, and called on the model's tensors returns the
            path-norm without care for range.
        lifted: the network as the rules write it, with activations and signs, at full resolution.
        reduced: the same after the spatial reduction, before each layer is lowered to what computes
            it fastest.
        dtype: number format of the evaluation; float64 takes over where float32 cannot hold the
            span of one tensor.
        q: exponent of the path-norm.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> program = fxpath.compile(model, (2,), backend="eager")
        >>> program.path_norm()
        6.0
        >>> _ = model.weight.data.mul_(2)
        >>> program.path_norm()
        12.0
    """

    def __init__(
        self,
        captured: Captured,
        graphs: Rewritten,
        dtype: torch.dtype,
        q: float,
        backend: str = "eager",
        given: Given | None = None,
    ) -> None:
        """Programs are made by :func:`fxpath.compile`."""
        self.captured = captured
        self.given = given
        self.lifted, self.reduced = graphs.lifted, graphs.reduced
        self.graph_module = graphs.lowered
        self.dtype = dtype if q == 1 else torch.float64
        self.q = q
        self.flat = Flat(self.graph_module, Setting(captured, q), backend)
        self.runs = Runs(captured, self.lifted, self.flat, self.dtype)

    def __repr__(self) -> str:
        kind = "generalised path-norm, " if self.gates else ""
        return f"<PathProgram: {kind}q={self.q:g}, {self.dtype}, input {self.captured.inputs}>"

    @cached_property
    def gates(self) -> tuple[Gate, ...]:
        """What was taken as a gate on the paths; where there are any, norms are generalised ones.

        Nothing unless gates were asked for.
        """
        return find_taken(self.captured, self.lifted)

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
            UnsupportedModelError: if a weight is computed by an ``autograd.Function``, whose
                backward is not captured.
        """
        refuse_sharded(self.captured.source, "a norm that differentiates")
        problems = own_gradients(self.captured)
        if problems:
            raise UnsupportedModelError(SupportReport(tuple(problems)))
        live = self.captured.live()
        for dtype in self.runs.formats():
            run, log, gradients = self.flat.gradients(live, dtype)
            if self.runs.healthy(dtype, run, live):
                return log_of(self.flat, live, dtype, log, gradients) / (self.q or 1)
        raise self.runs.failure(live)

    def scores(self, out: MutableMapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Shares Path-Mag / path-norm of every coordinate of theta.

        Args:
            out: tensors to write into, one for every score, of its shape and of a floating dtype.

        Returns:
            Parameter name -> tensor of the parameter's shape, entries in [0, 1] (unless an entry is
            used twice on a path), in the program's number format; in float64 where float32 would
            make zeros of small ones.  ``out`` itself holds the tensors if it was given.

        Raises:
            ValueError: if ``out`` has other names or shapes than the scores, integers, a format
                that does not hold them, or memory that two of them or the model share.
        """
        if out is None:
            return self.evaluate(scores=True).shares
        refuse_sharded(self.captured.source, "what is written into out=")
        live = self.captured.live()
        read = {self.captured.tensors[key]: tensor for key, tensor in live.items()}
        check_buffers(out, score_shapes(self.graph_module), read)
        shares = self.evaluate(scores=True, out=out, tensors=live).shares
        for name, share in shares.items():
            if share is not out[name]:
                check_holds(name, share, out[name])
                with torch.no_grad():
                    out[name].copy_(share)
        return dict(out)

    @plain_mode()
    def exported(self, scores: bool = True) -> ExportedProgram:
        """The flat graph as an ``ExportedProgram`` of ATen operations, for any toolchain.

        It holds the model's tensors as buffers under their own names, takes no input, and returns a
        dictionary of tensors: ``mantissa`` and ``exponent`` of ``||Phi||_q^q = mantissa * 2 **
        exponent``, ``mass`` (or ``smallest``; see Raises), and ``scores``, name -> shares of path
        mass (14).  It loads where fxpath is not installed.  Of a network with gates it computes the
        generalised path-norm, which nothing in it says.

        Args:
            scores: whether it computes scores and ``mass``, or the norm and ``smallest`` alone.

        Returns:
            The program, in the program's number format; scores that this does not hold (below
            1e-38 in float32) are 0 there, where :meth:`scores` has them.  Weights are exchanged
            with ``exported.module().load_state_dict(..., strict=False)``, which returns the names
            that are no weights of it: masks, lists of positions, and what the model's code reads as
            a number are part of the architecture.  A toolchain that computes beforehand what
            depends on no input (``torch.onnx.export`` does) freezes them.

        Raises:
            FloatingPointError: if float32 does not suffice for the model as it is: compile it with
                ``dtype=torch.float64``.  With other weights it suffices while ``mass`` is at most
                2^85 (float64: 2^900), or if ``smallest`` is at least 2^-85 (2^-900).

        Example:
            >>> import torch, fxpath
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> _ = torch.nn.init.constant_(model.weight, -3.0)
            >>> found = fxpath.compile(model, backend="eager").exported().module()()
            >>> float(found["mantissa"] * 2 ** found["exponent"])
            6.0
            >>> found["scores"]["weight"].tolist()
            [[0.5, 0.5]]
        """
        refuse_sharded(self.captured.source, "an exported program")
        live = self.captured.live()
        ending: Ending = "scores" if scores else "norm"
        run = self.runs.run(
            self.dtype, live, self.runs.buffers(self.dtype, live, {}) if scores else None
        )
        if not self.runs.healthy(self.dtype, run, live):
            raise self.runs.failure(live)
        derived = derive(self.graph_module, self.flat.setting, self.dtype, ending)
        return exported(derived, self.captured.tensors, live, self.captured.baked)

    @plain_mode()
    def save(self, path: str | Path, kind: str | None = None, scores: bool = True) -> None:
        """Write :meth:`exported` into a file for other toolchains, with a :meth:`certificate`.

        One file serves all weights of the architecture: what it holds are the model's tensors under
        their own names, to be exchanged without fxpath and without compiling again.  Its results,
        and up to where float32 suffices for other weights, are those of :meth:`exported`.

        Args:
            path: of the file, ``.pt2`` or ``.onnx``.
            kind: ``"exported"`` (of a ``.pt2`` by default), for ``torch.export.load``, weights in
                its ``state_dict``; ``"aoti"``, a ``.pt2`` compiled by AOTInductor for this machine,
                weights by ``load_constants`` in Python or C++; ``"onnx"`` (of a ``.onnx``), weights
                as initializers that are inputs with a default value, scores as ``scores.NAME``.
            scores: whether it computes scores too, or the norm alone.

        Raises:
            ValueError: for another ``kind``, or a name that does not go with it; for a network with
                gates, as :meth:`certificate`.
            FloatingPointError: if float32 does not suffice, see :meth:`exported`.
            ImportError: for ONNX, where its packages are missing.

        Example:
            >>> import tempfile, torch, fxpath
            >>> program = fxpath.compile(torch.nn.Linear(2, 1), backend="eager")
            >>> path = f"{tempfile.mkdtemp()}/linear.pt2"
            >>> program.save(path)
            >>> sorted(torch.export.load(path).module()())
            ['exponent', 'mantissa', 'mass', 'scores']
        """
        path = Path(path)
        kind = kind_of(path, kind)
        certificate = self.certificate().to_json()
        write(self.exported(scores), path, kind, certificate)

    @plain_mode()
    def certificate(self) -> Certificate:
        """What is claimed of the weights as they are: :func:`fxpath.certify` of the model.

        Raises:
            ValueError: for a network with gates, of which there is nothing to certify.
        """
        if self.gates:
            raise ValueError(NO_CERTIFICATE)
        refuse_sharded(self.captured.source, "a certificate")
        live, given = self.captured.live(), self.given or Given()
        graphs = Rewritten(self.lifted, self.reduced, self.graph_module)
        exact = PathProgram(self.captured, graphs, torch.float64, self.q, given=given)
        found = exact.evaluate(scores=True, details=True, tensors=live)
        return record(self.captured, self.lifted, given, found, live)

    @plain_mode()
    def with_exponent(self, q: float) -> PathProgram:
        """The same rewritten model for another exponent.

        Args:
            q: a finite number >= 0.

        Raises:
            ValueError: for any other ``q``.
        """
        setting = Setting(self.captured, _exponent(q))
        graphs = rewrite(self.lifted, setting, self._whole)
        return PathProgram(self.captured, graphs, self.dtype, setting.q, given=self.given)

    @property
    def _whole(self) -> bool:
        """Whether it runs at full resolution."""
        return self.reduced is self.lifted

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if isinstance(self.captured.source, ExportedProgram):
            raise TypeError(
                "a program of an ExportedProgram does not pickle: save that with "
                "torch.export.save, and compile again"
            )
        return _rebuild, (self.captured.source, *self._request())

    def __deepcopy__(self, memo: dict[int, Any]) -> PathProgram:
        return _rebuild(copy.deepcopy(self.captured.source, memo), *self._request())

    def _request(self) -> tuple[Any, ...]:
        """What :func:`build` was asked for."""
        return self.given, self.q, self.dtype, self.flat.backend, not self._whole

    def sizes(self) -> list[SizeRow]:
        """Extents and multiply-adds of each activation, at full resolution and as kept."""
        return sizes(self.lifted, self.reduced)

    @plain_mode()
    def evaluate(
        self,
        scores: bool,
        details: bool = False,
        out: Mapping[str, Tensor] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Evaluation:
        """Run in the program's number format, or in float64 where it does not suffice.

        Args:
            scores: whether to differentiate.
            details: whether to count the zeros of theta, and to look for shares below float64.
            out: tensors that are used for the scores, where they have the right form.
            tensors: what takes the place of the model's own, by placeholder, of the same form.

        Raises:
            ValueError: for a NaN or infinite parameter, by name.
            FloatingPointError: if float64 does not suffice either.
        """
        live = self.captured.live() if tensors is None else tensors
        if tensors is None:
            check_alike(self.runs.read(live))
        return self.runs.evaluate(live, scores, details, out or {})


@plain_mode()
def build(
    model: Model,
    given: Given | Shapes = None,
    q: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str = "eager",
    reduced: bool = True,
    sharded: bool = False,
) -> PathProgram:
    """Capture and rewrite a model, for what the caller says about inputs or their shape alone.

    Sharded parameters are refused where ``sharded`` does not say that whole tensors are not needed.

    Raises:
        ValueError: for a NaN or infinite parameter, a shape that cannot be inferred, q < 0, an
            unknown backend.
        UnsupportedModelError: listing every operation without an exact rule.
    """
    exponent = _exponent(q)
    check_backend(backend)
    given = given if isinstance(given, Given) else Given(given)
    check_format(dtype)
    if backend != "eager":
        refuse_sharded(model, f'code that backend="{backend}" makes')
    captured, lifted = take_in(model, given, sharded)
    own = format_of(captured, lifted)
    graphs = rewrite(lifted, Setting(captured, exponent), not reduced)
    return PathProgram(captured, graphs, dtype or own, exponent, backend, given)


def _rebuild(
    model: Model, given: Given | None, q: float, dtype: torch.dtype, backend: str, reduced: bool
) -> PathProgram:
    """A copy of a program, for a copy of its model."""
    return build(model, given, q, dtype, backend, reduced, sharded=True)


def _exponent(q: float) -> float:
    if not 0 <= q < math.inf:
        raise ValueError(f"q = {q}: the exponent must be a finite number >= 0")
    if 0 < q < LEAST_EXPONENT:
        raise ValueError(
            f"q = {q}: below {LEAST_EXPONENT:g} float64 cannot tell the norm; q = 0 counts paths"
        )
    return float(q)
