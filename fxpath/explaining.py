"""How commands speak: what goes wrong with a model, and the headings of results."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

import fxpath
from fxpath.capture.loading import Model, UsageError, drawn, load_model, one_line
from fxpath.options import in_options
from fxpath_command.terminal import note, styled, working

__all__ = ["explained", "heading", "load", "number", "own_model", "say", "without_print_outs"]


@contextlib.contextmanager
def without_print_outs(arguments: argparse.Namespace) -> Iterator[None]:
    """Drops what is printed on standard error, unless `--traceback` asks for more.

    Where torch.export fails, torch prints the whole graph there.
    """
    with contextlib.ExitStack() as stack:
        if not arguments.traceback:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def explained(
    name: str, arguments: argparse.Namespace, place: str = "", shown: bool = True
) -> Iterator[None]:
    """Turns what goes wrong with a model into a message, unless `--traceback` asks for more.

    A person at a terminal sees meanwhile which model, in which place of several, it takes time for,
    unless that is `shown` in another way.
    """
    with (
        working(f"{place}{arguments.command} {name}", arguments.quiet or not shown),
        _explained(name, arguments),
    ):
        yield


@contextlib.contextmanager
def _explained(name: str, arguments: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except fxpath.UnsupportedModelError as error:
        problems = error.report.problems
        if arguments.traceback:
            raise
        if [problem.node for problem in problems] == ["(capture)"]:
            # Not one operation of the model but its capture.
            (problem,) = problems
            where = "" if problem.source_line in ("", "unknown") else f" ({problem.source_line})"
            text = f"{one_line(problem.reason)}{where}; {problem.remedy}"
            raise UsageError(f"{name}: {in_options(one_line(text))}") from error
        count = f"{len(problems)} operation{'s' * (len(problems) != 1)}"
        report = in_options(str(error.report))
        raise UsageError(f"{name}: no exact rule for {count}\n{report}") from error
    # A model is other people's code and may raise anything.
    except Exception as error:
        if arguments.traceback:
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{name}: {in_options(one_line(text))}") from error


def load(
    name: str,
    arguments: argparse.Namespace,
    weights: str | None = None,
    checkpoint: Path | None = None,
) -> Model:
    """The model that is named, on `--device`; what was changed in its checkpoint is said."""
    model = load_model(name, weights, checkpoint, _silent if arguments.quiet else note)
    if arguments.device is None:
        return model
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {arguments.device}: {one_line(error)}") from error
    return model.to(device) if isinstance(model, nn.Module) else move_to_device_pass(model, device)


def _silent(text: str) -> None:
    """A note that nobody asked for."""


def say(arguments: argparse.Namespace, text: object) -> None:
    """Prints a result, unless `--quiet` asks for none."""
    if not arguments.quiet:
        print(text, flush=True)


def own_model(arguments: argparse.Namespace) -> Model:
    """The MODEL of a command that has one, with the weights that the options name."""
    return load(arguments.model, arguments, arguments.weights, arguments.checkpoint)


def origin(name: str, arguments: argparse.Namespace) -> str:
    """Where the weights of a model come from, for the heading of its table."""
    if arguments.checkpoint is not None:
        return f"weights of {arguments.checkpoint}"
    if arguments.weights is not None:
        return f"weights {arguments.weights}"
    return "random weights, seed 0" if drawn(name) else "its own weights"


def heading(name: str, arguments: argparse.Namespace) -> str:
    """What stands above the table of a model."""
    return styled(f"{name} ({origin(name, arguments)})", "heading", sys.stdout)


def number(value: float, log10: float) -> str:
    """A path-norm, by its logarithm where it is beyond float64.

    Example:
        >>> number(1234.5678, 3.0915), number(float("inf"), 400.25)
        ('1234.57', '10^400.25')
    """
    return f"{value:.6g}" if math.isfinite(value) else f"10^{log10:.6g}"
