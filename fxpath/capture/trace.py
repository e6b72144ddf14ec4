"""torch.export on a stand-in, and what to say where it cannot trace a model."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fxpath.capture import generators
from fxpath.capture.inline import CHOICE
from fxpath.capture.inputs import Call
from fxpath.capture.numbers import Numbers, Overwritten, ParameterRead
from fxpath.capture.shapes import running
from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.model.copies import duplicate, locate
from fxpath.model.state import Reachable, untouched
from fxpath.modes import TRACING
from fxpath.private import HOOKS, call_uncompiled, entered_by, tree_map_only

#: What hooks are told that read values of activations; nothing may depend on it.
_PRETENCES = (0.0, 1e9, -1e9)
_HOOK = (
    "a hook reads values of activations as Python numbers, and what the model computes may depend "
    "on them",
    "remove the hook, or let it compute with tensors",
)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True)
class Traced:
    """An exported program, and the values of tensors that its code read as Python numbers."""

    program: ExportedProgram
    baked: dict[str, Tensor]


class _Stop(BaseException):
    """Ends a forward pass at the output of a module; no ``except Exception`` holds it up."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Failed(Exception):
    """An error of the model's code; torch.export prints the graph that it can hang on to one."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


class _Objected(Exception):
    """A hook raised an error after it was told made-up numbers."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


class _Refused(Exception):
    """Carries a problem out of torch.export."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


def trace(model: nn.Module, call: Call, until: str | None = None) -> Traced:
    """Export a copy of a model up to the last call of ``until``.

    Raises:
        ValueError: if ``until`` names no module, or one that is not called.
        UnsupportedModelError: if the model cannot be captured as one graph.
    """
    last = 1 if until is None else _count(model, call, until)
    with TRACING, untouched(model) as state, generators.restored():
        found: list[Traced] = []
        objection: _Objected | None = None
        for pretence in _PRETENCES:
            before = generators.states()
            try:
                traced, pretended = _export(model, call, until, last, state, pretence)
            except _Objected as error:
                # What a hook says of made-up numbers is no answer; another one may suit it.
                objection = error
                continue
            found.append(traced)
            if pretended:
                continue
            if before != generators.states():
                generators.reseed()
                other, _ = _export(model, call, until, last, state, pretence)
                if _text(other.program) != _text(traced.program):
                    _refuse(_random_problem(model))
            break
        if not found:
            assert objection is not None
            _refuse(objection.problem, objection)
        if any(_text(other.program) != _text(found[0].program) for other in found[1:]):
            path, hook = next(_hooks(model))
            _refuse(_hook_problem(hook, path))
        return found[0]


def run(model: nn.Module, call: Call) -> Any:
    """The output of a copy of a model for real inputs, which stay as they are.

    Of a sharded model, whose copy has no values, the form of its output.
    """
    with TRACING, _quiet(), untouched(model), running(model) as copied:
        args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), call)
        return copied(*args, **kwargs)


# -- the cut ---------------------------------------------------------------------------------------


def find(model: nn.Module, until: str) -> str:
    """The name of a module as the model has it; wrappers may be left out.

    Raises:
        ValueError: if there is no such module.
    """
    names = dict(model.named_modules())
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        if until and prefix + until in names:
            return prefix + until
    known = [name for name in names if name]
    raise ValueError(f"until={until!r} names no module; the last ones are {', '.join(known[-5:])}")


def _count(model: nn.Module, call: Call, until: str) -> int:
    """How often a forward pass calls a module, as far as it comes."""
    name, calls = find(model, until), list[None]()
    failed = False
    with TRACING, untouched(model), running(model) as copied:
        copied.get_submodule(name).register_forward_hook(lambda *_: calls.append(None))
        args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), call)
        try:
            with _quiet():
                copied(*args, **kwargs)
        # What stands behind the cut is not asked to work.
        except Exception:
            failed = True
    if not calls and not failed:
        raise ValueError(f"until={until!r}: this module is not called by the model's forward")
    return max(1, len(calls))


def _stop_at(module: nn.Module, call: int, reached: list[None]) -> None:
    """End the forward pass at a call of a module, and note that it was reached."""
    calls = list[None]()

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            reached.append(None)
            raise _Stop(output)

    module.register_forward_hook(stop)


# -- one trace -------------------------------------------------------------------------------------


def _export(
    model: nn.Module,
    call: Call,
    until: str | None,
    last: int,
    state: Reachable,
    pretence: float,
) -> tuple[Traced, int]:
    """A trace in which hooks read ``pretence``, and how often they did."""
    copied, memo = duplicate(model)
    names = {id(module): name for name, module in copied.named_modules()}
    numbers = Numbers(copied, pretence)
    changed = state.watch(key for key, value in memo.items() if id(value) != key)
    for path, module in copied.named_modules():
        for attribute in HOOKS:
            hooks = getattr(module, attribute)
            for key, hook in hooks.items():
                hooks[key] = _watched(hook, path, numbers, changed)
    stop = None if until is None else copied.get_submodule(find(copied, until))

    reached = list[None]()

    def entry(*args: Any, **kwargs: Any) -> Any:
        numbers.start()
        if stop is not None:
            _stop_at(stop, last, reached)
        stack = getattr(getattr(get_proxy_mode(), "tracer", None), "module_stack", {})
        depth = len(stack)
        with numbers:
            try:
                result = call_uncompiled(copied, *args, **kwargs)
                if reached:
                    raise _Refused(_held_up(until or "", copied))
                return result
            except _Stop as stopped:
                # The tracer notes which module is running, and expects each of them to return.
                while len(stack) > depth:
                    stack.popitem()
                return stopped.output
            except Exception as error:
                if reached:
                    raise _Refused(_held_up(until or "", copied)) from error
                raise _Failed(error) from error

    for module in copied.modules():
        entered_by(module, None)
    # Hooks of the model itself run inside of it, which a replaced forward would not see.
    entered_by(copied, entry)
    try:
        with _quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(copied, *call, strict=False)
    except Exception as error:
        cause = error.error if isinstance(error, _Failed) else error
        problem = _capture_problem(cause, names)
        if numbers.in_hook and numbers.pretended and not isinstance(cause, _Refused):
            raise _Objected(replace(problem, reason=_HOOK[0], remedy=_HOOK[1])) from cause
        _refuse(problem, cause)
    written = changed()
    if written is not None:
        _refuse(_written(written, type(model).__name__, "", "unknown"))
    return Traced(program, numbers.read), numbers.pretended


def _watched(
    hook: Callable[..., Any], path: str, numbers: Numbers, changed: Callable[[], str | None]
) -> Callable[..., Any]:
    """A hook that may read made-up numbers, and that must not write to the model itself."""

    @functools.wraps(hook, updated=())
    def watched(*args: Any, **kwargs: Any) -> Any:
        before, numbers.in_hook = numbers.in_hook, True
        told, writes = numbers.pretended, numbers.writes
        # Where it raises, the flag stays up: the trace has ended in a hook.
        result = hook(*args, **kwargs)
        numbers.in_hook = before
        if numbers.pretended > told and (result is not None or numbers.writes > writes):
            raise _Refused(_hook_problem(hook, path))
        written = changed()
        if written is not None:
            raise _Refused(_written(written, _name(hook), path, locate(hook)))
        return result

    return watched


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's own log says nothing in this thread."""
    here = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and (name == "torch" or name.startswith("torch."))
    ]
    for logger in loggers:
        logger.addFilter(elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(elsewhere)


def _text(program: ExportedProgram) -> tuple[str, dict[str, Any]]:
    """A program as something that can be compared."""
    constants = {
        name: value.tolist() if isinstance(value, Tensor) else repr(value)
        for name, value in program.constants.items()
    }
    return str(program.graph), constants


# -- what went wrong -------------------------------------------------------------------------------


def _refuse(problem: Problem, error: Exception | None = None) -> NoReturn:
    raise UnsupportedModelError(SupportReport((problem,))) from error


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def _written(what: str, name: str, path: str, where: str) -> Problem:
    return Problem(
        name,
        "(capture)",
        path,
        where,
        f"it writes to the model itself ({what}), which it holds by a way that a copy of the model "
        "does not follow, so that what the copy computes need not be what the model does",
        "remove the hook, or let it reach the model through its arguments",
    )


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        for attribute in HOOKS:
            for hook in getattr(module, attribute).values():
                yield path, hook


def _hook_problem(hook: Any, path: str) -> Problem:
    return Problem(
        _name(hook),
        "(capture)",
        path,
        locate(hook),
        *_HOOK,
    )


def _held_up(until: str, model: nn.Module) -> Problem:
    return Problem(
        "except",
        "(capture)",
        "",
        locate(model.forward),
        f"its code catches every exception, and with it the one by which the pass ends at {until}",
        "write 'except Exception' in place of a bare 'except'",
    )


def _random_problem(model: nn.Module) -> Problem:
    return Problem(
        "random",
        "(capture)",
        "",
        locate(model.forward),
        "what it computes depends on random numbers that its code draws from Python's or numpy's "
        "generator",
        "remove the noise in eval mode (if self.training)",
    )


def _capture_problem(error: Exception, names: dict[int, str]) -> Problem:
    """What torch.export could not trace, with the user's own line."""
    if isinstance(error, _Refused):
        return error.problem
    where, path = "unknown", ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        file = frame.f_code.co_filename
        path = names.get(id(frame.f_locals.get("self")), path)
        if "/torch/" not in file and not file.startswith((_PACKAGE, "<")):
            where = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, ParameterRead):
        reason = (
            f"the value of the parameter {text} is read as a Python number, which has no scores"
        )
        remedy = "compute with the parameter as a tensor, or make it a buffer"
    elif type(error).__name__ == "UncapturedHigherOrderOpError":
        reason, remedy = CHOICE
    elif isinstance(error, Overwritten):
        reason = "a Python number is read from a tensor that forward itself has written to"
        remedy = "compute the number without writing in place"
    elif "fake impl" in str(error):
        reason = f"an operator does not tell torch the shape of its result ({text})"
        remedy = "register a function for it that does: torch.library.register_fake"
    elif "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        reason = f"control flow that depends on the values of activations ({text})"
        remedy = (
            'replace the branch by tensor operations, or cut the model before it with until="..."'
        )
    else:
        reason = f"torch.export cannot trace the model: {type(error).__name__}: {text}"
        remedy = "check input_shape/example_inputs against a plain call of the model"
    return Problem("torch.export.export", "(capture)", path, where, reason, remedy)
