"""The command `compare`: a row for each checkpoint, kept as it is made and shared out by rank."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

from torch import distributed as dist

import fxpath
from fxpath.capture.loading import UsageError, one_line
from fxpath.checkpoints.comparison import Comparison
from fxpath.checkpoints.ranks import Lost
from fxpath.explaining import explained, own_model, say, without_print_outs
from fxpath.options import model_options
from fxpath_command.terminal import complain, counting

__all__ = ["compare"]

#: How long a rank waits for the next row of another one.
_PATIENCE = datetime.timedelta(minutes=10)

#: What torchrun says to each process.
_STARTED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def compare(arguments: argparse.Namespace) -> int:
    """Prints a table of all checkpoints; one that is refused does not stop the rest."""
    with _group() as group:
        if group is not None and dist.get_rank():
            return _other_rank(arguments, group)
        found = _compared(arguments, group)
    say(arguments, f"{found.table().title}\n\n{found.table()}")
    if arguments.plot is not None:
        _draw(found, arguments.plot)
    for reason in found.refused.values():
        complain(reason)
    return 2 if found.refused else 0


def _other_rank(arguments: argparse.Namespace, group: dist.ProcessGroup) -> int:
    """Says nothing but that another rank is lost: what is wrong with files rank 0 says too."""
    arguments.quiet = True
    try:
        _compared(arguments, group)
    except UsageError as error:
        if isinstance(error.__cause__, Lost):
            raise
        return 2
    return 0


def _compared(arguments: argparse.Namespace, group: dist.ProcessGroup | None) -> Comparison:
    with explained(arguments.model, arguments):
        model = own_model(arguments)
    with (
        counting(arguments.quiet) as progress,
        explained(arguments.model, arguments, shown=False),
        without_print_outs(arguments),
    ):
        try:
            return fxpath.compare(
                model,
                arguments.checkpoints,
                reference=arguments.reference,
                radius=arguments.radius,
                csv=arguments.csv,
                progress=progress,
                group=group,
                **model_options(arguments),
            )
        except Lost as error:
            raise UsageError(one_line(error)) from error
        except OSError as error:
            raise UsageError(f"--csv {arguments.csv}: {one_line(error)}") from error


@contextlib.contextmanager
def _group() -> Iterator[dist.ProcessGroup | None]:
    """The processes that torchrun started; ``None`` for one alone."""
    if not _STARTED <= os.environ.keys() or int(os.environ["WORLD_SIZE"]) < 2:
        yield None
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the other processes cannot be reached: {one_line(error)}") from error
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _draw(found: Comparison, path: Path) -> None:
    try:
        (axes, *_) = found.plot()
        axes.get_figure().savefig(path, dpi=150)  # type: ignore[union-attr]
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {one_line(error)}") from error
