"""The public verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpath.errors import SupportReport, UnsupportedModelError
from fxpath.model import Given, Model, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.passes import take_in
from fxpath.program.analysis import Analysis
from fxpath.program.gates import find_taken
from fxpath.program.program import PathProgram, build

__all__ = ["analyze", "check", "compile", "path_magnitude", "path_norm", "path_norms"]


def analyze(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
    q: float = 1,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    reduce: bool = True,
) -> Analysis:
    """Path-norm and Path-Mag scores of a ReLU network, exact or refused.

    The l^q path-norm ``||Phi(theta)||_q`` of the path-lifting (Def. A.5) takes one pass through the
    lifted network; its gradient times ``|theta|`` is Path-Mag (14), the path mass lost when one
    entry is set to zero (10).  The model is not changed, and runs as in eval mode.

    Args:
        model: a module (in train or eval mode, pruned, parametrized, wrapped for data parallelism,
            in float32, float64 or half precision), an exported program, or an FX graph module.
            With sharded parameters (DTensors, ``fully_shard``) it is a collective call: every rank
            makes it, and parameters are gathered one at a time.
        input_shape: shape of one sample, without the batch axis, e.g. ``(3, 224, 224)``; a list of
            shapes for several inputs, a dict for inputs by name.  Inferred where the model leaves
            no choice.
        example_inputs: inputs instead of shapes, a tuple as for ``torch.export.export`` or one
            tensor.
        example_kwargs: keyword inputs, by name.
        batch_dim: the batch axis of every input; ``None`` says that there is none, and takes shapes
            and inputs as they are.
        until: name of a submodule: the network up to that module's output is analysed, and what
            stands behind it is not run.  Of several calls the last one counts.
        outputs: which outputs count, by position or by key; all of them by default.
        gates: take gates in (SiLU, GELU, tanh, factors like a sigmoid): the *generalised
            path-norm*, which bounds outputs as the path-norm does, but no difference of two sets of
            weights.  What only a gate reads has no path mass and is listed as unscored.
        q: exponent of the path-norm, >= 0; 0 counts non-zero paths.  Other than 1 runs in float64.
        dtype: ``torch.float32`` or ``torch.float64``; by default float64 if the model has such
            parameters, else float32.
        compile: run the graph through ``torch.compile`` with Inductor; for one evaluation it costs
            more than it saves.
        reduce: shrink the network by its spatial symmetry first; exact either way, ``False`` is
            for comparison.

    Returns:
        An :class:`~fxpath.Analysis`; scores of sharded parameters are DTensors, spread like these.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for a NaN or infinite parameter (named), an input shape that is missing and
            cannot be inferred, an unknown ``until``, a wrong ``q`` or ``dtype``; for sharded
            parameters that are gathered at the moment, or with ``compile``.
        FloatingPointError: if the entries of one tensor span more than float64 holds.

    Example:
        >>> import torch, fxpath
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> analysis = fxpath.analyze(model)
        >>> sorted(analysis.scores)
        ['0.bias', '0.weight', '2.bias', '2.weight']
        >>> bool(analysis.scores["2.weight"].sum() + analysis.scores["2.bias"].sum() > 0.999)
        True
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    backend = "inductor" if compile else "eager"
    return Analysis.of(build(model, given, q, dtype, backend, reduce, sharded=True))


def compile(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
    q: float = 1,
    dtype: torch.dtype | None = None,
    backend: str = "inductor",
    reduce: bool = True,
) -> PathProgram:
    """Capture and rewrite a model once, to evaluate it many times on its live parameters.

    One flat graph of ATen operations computes the norm and every score.

    Args:
        model: as for :func:`analyze`.
        input_shape: as for :func:`analyze`.
        example_inputs: as for :func:`analyze`.
        example_kwargs: as for :func:`analyze`.
        batch_dim: as for :func:`analyze`.
        until: as for :func:`analyze`.
        outputs: as for :func:`analyze`.
        gates: as for :func:`analyze`.
        q: as for :func:`analyze`.
        dtype: as for :func:`analyze`.
        backend: what runs the graph: ``"inductor"`` compiles it as a whole at the first evaluation,
            which takes from seconds to a minute, and again only if forms of tensors change;
            ``"eager"`` runs it as it is; any other name of a backend of ``torch.compile`` is passed
            on.  Where float32 does not suffice, the graph in float64 is run in the same way.
        reduce: as for :func:`analyze`.

    Returns:
        A :class:`~fxpath.PathProgram`.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: as :func:`analyze`, or for an unknown backend.

    Example:
        >>> import torch, fxpath
        >>> program = fxpath.compile(torch.nn.Linear(3, 2), backend="eager")
        >>> loss = 0.01 * program.log_path_norm()
        >>> loss.backward()
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    return build(model, given, q, dtype, backend, reduce, sharded=True)


def path_norm(model: Model, input_shape: Shapes = None, *, q: float = 1, **options: Any) -> float:
    """The l^q path-norm ``||Phi(theta)||_q``; options as for :func:`analyze`.

    Returns:
        A float >= 0; ``inf`` only where float64 cannot hold it.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: as :func:`analyze`.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(model.weight, -2.0), torch.nn.init.zeros_(model.bias)
        >>> fxpath.path_norm(model), fxpath.path_norm(model, q=0)
        (4.0, 2.0)
    """
    return _program(model, input_shape, q=q, **options).path_norm()


def path_norms(
    model: Model, input_shape: Shapes = None, *, q: Sequence[float] = (1, 2, 4), **options: Any
) -> dict[float, float]:
    """Several path-norms of one model, which is captured once; options as for :func:`analyze`.

    Returns:
        Exponent -> ``||Phi(theta)||_q``.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: as :func:`analyze`.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> {q: round(norm, 9) for q, norm in fxpath.path_norms(model, q=(1, 2)).items()}
        {1: 7.0, 2: 5.0}
    """
    norms: dict[float, float] = {}
    program: PathProgram | None = None
    for exponent in q:
        program = (
            _program(model, input_shape, q=exponent, **options)
            if program is None
            else program.with_exponent(exponent)
        )
        norms[exponent] = program.path_norm()
    return norms


def path_magnitude(model: Model, input_shape: Shapes = None, **options: Any) -> dict[str, Tensor]:
    """Absolute Path-Mag (10) of every scored entry; options as for :func:`analyze`.

    Returns:
        Parameter name -> tensor of the parameter's shape, entries >= 0.

    Raises:
        OverflowError: if an entry does not fit; the shares of :func:`analyze` do.
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: as :func:`analyze`.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> [round(v, 4) for v in fxpath.path_magnitude(model)["weight"][0].tolist()]
        [3.0, 4.0]
    """
    analysis = analyze(model, input_shape, **options)
    return {name: analysis.path_magnitude(name) for name in analysis.scores}


@plain_mode()
def check(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> SupportReport:
    """Whether a model is covered by the theory; evaluates nothing.

    Args:
        model: as for :func:`analyze`.
        input_shape: as for :func:`analyze`.
        example_inputs: as for :func:`analyze`.
        example_kwargs: as for :func:`analyze`.
        batch_dim: as for :func:`analyze`.
        until: as for :func:`analyze`.
        outputs: as for :func:`analyze`.
        gates: as for :func:`analyze`.

    Returns:
        A :class:`~fxpath.SupportReport`, true if every operation has an exact rule.

    Raises:
        ValueError: for an input shape that is missing and cannot be inferred, an unknown ``until``.

    Example:
        >>> import torch, fxpath
        >>> report = fxpath.check(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.GELU()))
        >>> report.supported, report.problems[0].module_path
        (False, '1')
    """
    try:
        given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
        captured, lifted = take_in(model, given, sharded=True)
    except UnsupportedModelError as error:
        return error.report
    return SupportReport((), captured.inputs, find_taken(captured, lifted))


def _program(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
    q: float = 1,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    reduce: bool = True,
) -> PathProgram:
    """The program behind the verbs that take the options of :func:`analyze`."""
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    backend = "inductor" if compile else "eager"
    return build(model, given, q, dtype, backend, reduce, sharded=True)
