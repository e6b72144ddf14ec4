"""What the commands do: `fxpath analyze`, `prune`, `graph`, `check` and others.

How they are spelled stands in `fxpath_command`, which answers without this package; what a MODEL is
in `fxpath.capture.loading`.

What the user can put right is one line on standard error and exit code 2; so is a model that has no
exact result, but for its table of offending operations.
"""

from __future__ import annotations

import argparse
import logging
import textwrap
import warnings
from collections.abc import Callable, Sequence

from safetensors import SafetensorError
from safetensors.torch import save_file
from tabulate import tabulate
from torch import nn

import fxpath
from fxpath.analyzing import analyze
from fxpath.capture.loading import UsageError, one_line
from fxpath.comparing import compare
from fxpath.exchange import bound, export, verify
from fxpath.explaining import explained, heading, own_model, say, without_print_outs
from fxpath.gates import gates_line
from fxpath.options import in_options, model_options
from fxpath.program.sizes import SizeRow
from fxpath_command.terminal import complain

__all__ = ["COMMANDS", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command that the arguments name.

    Args:
        arguments: What `fxpath_command.parse` made of the command line.

    Returns:
        The exit code, as `main` says.

    Example:
        >>> from fxpath_command.parser import parse
        >>> run(parse(["check", "no_such_model"]))
        2
    """
    logged = logging.root.manager.disable
    if not arguments.traceback:
        # torch logs the traceback of an error before it raises it.
        logging.disable(logging.CRITICAL)
    try:
        return COMMANDS[arguments.command](arguments)
    except UsageError as error:
        complain(str(error))
        return 2
    finally:
        logging.disable(logged)


def _prune(arguments: argparse.Namespace) -> int:
    """Prints what pruning does, and writes the weights that it leaves."""
    verb = fxpath.prune_channels if arguments.channels else fxpath.prune
    with explained(arguments.model, arguments):
        model = own_model(arguments)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{arguments.model}: pass a module (package.module:callable) to prune")
        options = model_options(arguments)
        if arguments.channels:
            del options["gates"]
        with without_print_outs(arguments), warnings.catch_warnings():
            # What is cut altogether stands in the table.
            warnings.simplefilter("ignore", UserWarning)
            pruned = verb(
                model,
                arguments.amount,
                budget=arguments.budget,
                criterion=arguments.criterion,
                **options,
            )
    say(arguments, f"{heading(arguments.model, arguments)}\n{pruned}\n")
    try:
        if isinstance(pruned, fxpath.PrunedChannels):
            pruned.save(arguments.output)
            if arguments.plan is not None:
                arguments.plan.write_text(pruned.plan.to_json() + "\n", encoding="utf-8")
        else:
            save_file(pruned.state_dict, arguments.output, {"format": "pt", **pruned.claimed()})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--output {arguments.output}: {one_line(error)}") from error
    say(arguments, f"written to {arguments.output}")
    return 0


def _sizes_table(rows: Sequence[SizeRow]) -> str:
    """A line for each activation, and the sums."""
    lines = [
        (
            row["layer"],
            row["operation"].removesuffix(".default"),
            "x".join(map(str, row["full"])),
            "x".join(map(str, row["reduced"])),
            f"{row['full_macs'] / 1e6:.2f}",
            f"{row['reduced_macs'] / 1e6:.2f}",
        )
        for row in rows
    ]
    full = sum(row["full_macs"] for row in rows) / 1e6
    reduced = sum(row["reduced_macs"] for row in rows) / 1e6
    lines.append(("all", "", "", "", f"{full:.2f}", f"{reduced:.2f}"))
    headers = ["layer", "operation", "full", "kept", "MMAC full", "MMAC kept"]
    return tabulate(lines, headers=headers, disable_numparse=True)


def _graph(arguments: argparse.Namespace) -> int:
    """Prints the rewritten graph."""
    with explained(arguments.model, arguments):
        model = own_model(arguments)
        with without_print_outs(arguments):
            program = fxpath.compile(model, backend="eager", **model_options(arguments))
    say(arguments, f"# input {program.captured.inputs}")
    told = gates_line(program.gates, program.q)
    for line in textwrap.wrap(told, 98, break_on_hyphens=False):
        say(arguments, f"# {line}")
    if arguments.sizes:
        say(arguments, _sizes_table(program.sizes()))
    else:
        say(arguments, program.graph_module.graph)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Prints the support report."""
    with explained(arguments.model, arguments):
        model = own_model(arguments)
        with without_print_outs(arguments):
            report = fxpath.check(model, **model_options(arguments))
    say(arguments, in_options(str(report)))
    return 0 if report else 2


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "analyze": analyze,
    "prune": _prune,
    "graph": _graph,
    "check": _check,
    "export": export,
    "verify": verify,
    "bound": bound,
    "compare": compare,
}
