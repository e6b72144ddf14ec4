"""A backend of ``torch.compile`` that analyses what was captured, and hands it on unchanged.

    >>> import torch, fxpath
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> parts = []
    >>> compiled = torch.compile(
    ...     model, backend="fxpath", options={"inner": "eager", "callback": parts.append}
    ... )
    >>> x = torch.ones(1, 3)
    >>> torch.equal(compiled(x), model(x))
    True
    >>> round(parts[0].analysis.path_norm / fxpath.path_norm(model), 6)
    1.0
    >>> sorted(parts[0].analysis.scores)
    ['0.bias', '0.weight', '2.bias', '2.weight']

Torch finds the name by itself where fxpath is installed, and imports the package when the first
graph is compiled.  ``options`` are:

- ``inner``: the name of the backend that compiles, ``"inductor"`` by default.  It gets the very
  graph that torch handed over, so that outputs, gradients and running statistics are bit for bit
  those of ``torch.compile(model, backend=inner)``.
- ``report``: a JSON file, ``{"version": 1, "parts": [...]}``, written anew after each part.
- ``callback``: a function that is called with each :class:`~fxpath.toolchain.part.Part`.
- ``on_unsupported``: ``"warn"``, the default, says in one warning for each part what has no exact
  rule, and compiles it all the same; ``"raise"`` is an error.

**Parts.**  Dynamo captures a model in one graph, or in one for each stretch between two graph
breaks.  Each is analysed by itself: its inputs are what the code has in its local variables there,
such as the activations of the part before; its parameters, under the names that the compiled
module gives them, are its theta; all its outputs of floating point count, among them activations
that only the next part reads, and inputs that it writes into.  The product of the parts' path-norms
is not the model's.  A part without parameters, or without such an output, is listed with that as
the reason.

**What is analysed** is a copy of the captured graph, with the whole example: a batch of n counts n
times, shares are not affected.  As in :func:`fxpath.analyze`, torch's own modules (batch norm,
dropout) run as in evaluation mode, whatever mode was compiled.  Other code that depends on the mode
is analysed as captured.  Lengths and numbers that may change without another compilation are
analysed with the values at hand, which the part lists as ``dynamic`` and ``numbers``.

**A report's entry** has the part's number (``part``), ``compile_id``, ``source_line``, ``status``,
``inputs``, ``dynamic`` and ``numbers``.  Where the status is ``analysed``, the rest is that of
``Analysis.to_dict()``, where it is ``unsupported`` the ``problems`` as in
``SupportReport.to_dict()``, and where it is ``not analysed`` a ``reason``.  What is compiled again
(for another shape, say) is another entry, and what is not compiled again is none: weights that have
changed, or a second model of the same classes and shapes that has equal options, run what torch
compiled before.  One dictionary of options is one report; ``torch._dynamo.reset()`` begins it anew.

**Errors** come out of the compiled model's first call: torch wraps them as
``torch._dynamo.exc.BackendCompilerFailed``, which has the message, and the error itself as
``inner_exception``.  With ``on_unsupported="raise"`` that is an
:class:`~fxpath.UnsupportedModelError`, or the ``ValueError``, ``FloatingPointError`` or
``OverflowError`` with which the analysis failed.  A callback's own error, and options that are not
known (``ValueError``, ``TypeError``), arrive in the same way.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxpath.api import analyze, check
from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.modes import plain_mode
from fxpath.private import compile_id, lookup_backend, outside_dynamo
from fxpath.program.backends import ANALYSIS
from fxpath.report.plain import finite
from fxpath.rules.refused import TRAINING
from fxpath.toolchain.part import Part
from fxpath.toolchain.separate import Separate, separate

__all__ = ["Part", "compile_part", "forget"]

_ON_UNSUPPORTED = ("warn", "raise")
#: What fxpath raises where a model is supported and its values have no path-norm.
_NO_RESULT = (ValueError, FloatingPointError, OverflowError)
#: In place of what is said of models in eval mode, which obey it or do not.
_COMPILED_TRAINING = (
    "it was compiled in training mode, where its output is random or depends on the batch, and no "
    "module of torch's own calls it, which would be analysed as in evaluation mode",
    "call it by its module (nn.Dropout, nn.BatchNorm2d), or compile the model in evaluation mode",
)


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options=)`` may say to this backend."""

    inner: str = "inductor"
    report: str | os.PathLike[str] | None = None
    on_unsupported: str = "warn"
    callback: Callable[[Part], object] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Read what the caller says.

        Raises:
            ValueError: for an option, a backend or a word that is not known, with those that are.
            TypeError: for a report that is no path, or a callback that cannot be called.
        """
        known = list(cls.__dataclass_fields__)
        for name in given:
            if name not in known:
                raise ValueError(f"option {name!r} is not known: {', '.join(known)} are")
        options = cls(**given)
        backends = [name for name in torch.compiler.list_backends(None) if name != ANALYSIS]
        if options.inner not in backends:
            raise ValueError(f"inner={options.inner!r}: known are {', '.join(backends)}")
        if options.on_unsupported not in _ON_UNSUPPORTED:
            known = [repr(word) for word in _ON_UNSUPPORTED]
            raise ValueError(
                f"on_unsupported={options.on_unsupported!r}: known are {', '.join(known)}"
            )
        if not isinstance(options.report, str | os.PathLike | None):
            raise TypeError(f"report={options.report!r} is no path of a file")
        if options.report is not None and Path(options.report).is_dir():
            raise ValueError(f"report={options.report!r} is a folder: name a file in it")
        if options.callback is not None and not callable(options.callback):
            raise TypeError(f"callback={options.callback!r} cannot be called")
        return options


@dataclass(frozen=True)
class _Record:
    """The entries of one report, and the options that it belongs to."""

    # Kept, so that no other dictionary gets its id.
    options: Mapping[str, Any] | None
    entries: list[dict[str, Any]] = field(default_factory=list)


#: By the id of the caller's options, all that torch hands to each of a model's parts alike.
_RECORDS: dict[int, _Record] = {}


def forget() -> None:
    """Begin all reports anew."""
    _RECORDS.clear()


def compile_part(
    graph_module: fx.GraphModule, example_inputs: list[Any], options: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """Analyse one captured graph, and let the inner backend compile it.

    Args:
        graph_module: what Dynamo captured.
        example_inputs: its inputs, the model's tensors among them.
        options: those of ``torch.compile``; the same object for each of a model's parts.

    Returns:
        What the inner backend made of ``graph_module`` and ``example_inputs`` themselves.

    Raises:
        UnsupportedModelError: with ``on_unsupported="raise"``, listing what has no exact rule.
        ValueError: for options that are not known; with ``on_unsupported="raise"`` also for a NaN
            or infinite parameter.
        TypeError: for options of a wrong type.
        FloatingPointError: with ``on_unsupported="raise"``, as :func:`fxpath.analyze`.
        OverflowError: with ``on_unsupported="raise"``, as :func:`fxpath.analyze`.
    """
    chosen = Options.of(options or {})
    inner = lookup_backend(chosen.inner)
    record = _Record(options)
    if options is not None:
        record = _RECORDS.setdefault(id(options), record)
    part, error = _examine(graph_module, example_inputs, len(record.entries))
    record.entries.append(part.to_dict())
    if chosen.report is not None:
        _write(Path(chosen.report), record.entries)
    if chosen.callback is not None:
        chosen.callback(part)
    if error is not None and chosen.on_unsupported == "raise":
        raise error
    if error is not None:
        warnings.warn(_warning(part), UserWarning, stacklevel=2)
    return inner(graph_module, example_inputs)


def _examine(
    graph_module: fx.GraphModule, example_inputs: list[Any], index: int
) -> tuple[Part, Exception | None]:
    """What is found out about a part, and the error if that failed."""
    part = Part(index, compile_id(), "unknown", {}, {}, {})
    with plain_mode(), outside_dynamo():
        try:
            found = separate(graph_module, example_inputs)
            part = replace(
                part,
                source_line=found.source_line,
                inputs={name: tuple(x.shape) for name, x in found.inputs.items()},
                dynamic=found.dynamic,
                numbers=found.numbers,
            )
            return _analysed(part, found), None
        except UnsupportedModelError as error:
            report = _as_compiled(error.report)
            return replace(part, report=report), UnsupportedModelError(report)
        except _NO_RESULT as error:
            return replace(part, reason=f"{type(error).__name__}: {error}"), error


def _analysed(part: Part, found: Separate) -> Part:
    if not found.outputs:
        return replace(part, reason="it has no output of floating point")
    given: dict[str, Any] = {
        "example_inputs": (),
        "example_kwargs": found.inputs,
        "batch_dim": None,
        # All of them, so that no refusal advises a user to choose among a part's outputs.
        "outputs": list(range(found.outputs)),
    }
    if next(found.module.parameters(), None) is not None:
        return replace(part, analysis=analyze(found.module, **given))
    report = check(found.module, **given)
    if not report:
        raise UnsupportedModelError(report)
    return replace(part, reason="it has no parameters, and so nothing that has a score")


def _as_compiled(report: SupportReport) -> SupportReport:
    """A refusal that does not blame a model for the mode that it was compiled in."""
    problems = [
        replace(problem, reason=_COMPILED_TRAINING[0], remedy=_COMPILED_TRAINING[1])
        if (problem.reason, problem.remedy) == TRAINING
        else problem
        for problem in report.problems
    ]
    # It takes no gates in.
    return replace(report, problems=tuple(problems), advice="")


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write a report as a whole: whoever reads it meanwhile sees the one before."""
    text = json.dumps(finite({"version": 1, "parts": entries}), indent=2, allow_nan=False)
    whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    whole.write_text(text + "\n", encoding="utf-8")
    os.replace(whole, path)


def _warning(part: Part) -> str:
    what = part.reason if part.report is None else "; ".join(map(_told, part.report.problems))
    return (
        f"fxpath: no exact path-norm for what torch.compile captured as {part.compile_id} "
        f"({part.source_line}), which is compiled all the same: {what}"
    )


def _told(problem: Problem) -> str:
    where = ", ".join(x for x in (problem.module_path, problem.source_line) if x and x != "unknown")
    return f"{problem.operation}{f' ({where})' if where else ''}: {problem.reason}"
