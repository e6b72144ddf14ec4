"""The command line: `fxpath analyze`, `prune`, `graph`, `check` and `bench`.

A MODEL is the name of a torchvision model (with random weights unless `--weights` or `--checkpoint`
says otherwise), `package.module:callable`, or a `.pt2` file; `fxpath.capture.loading` has the
details.

What the user can put right is one line on standard error and exit code 2; so is a model that has no
exact result, but for its table of offending operations.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tabulate import tabulate
from torch import nn

import fxpath
from fxpath.capture.loading import Model, UsageError, load_model, one_line
from fxpath.certificate import MEMBER
from fxpath.exchange import bound, export, verify
from fxpath.explaining import check_folder, explained, number, origin, without_print_outs
from fxpath.options import in_options, make_parser, model_options
from fxpath.program.sizes import SizeRow
from fxpath.report.plain import finite

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0; 1 if a bound or a certificate does not hold; 2 if something was wrong with
        the arguments or with a model; 130 after a Ctrl-C.

    Raises:
        SystemExit: After `--help`, `--version` and arguments that do not parse, as argparse does.

    Example:
        >>> main(["analyze", "--checkpoint", "a.pt", "alexnet", "vgg16"])
        2
    """
    commands = {"analyze": _analyze, "prune": _prune, "graph": _graph, "check": _check}
    exchange = {"export": export, "verify": verify, "bound": bound}
    parser = make_parser({**commands, **exchange, "bench": _bench})
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    logged = logging.root.manager.disable
    if not arguments.traceback:
        # torch logs the traceback of an error before it raises it.
        logging.disable(logging.CRITICAL)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except UsageError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        print("fxpath: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # A reader that has seen enough, as in `fxpath graph resnet18 | head`, is no error; the
        # interpreter must not find a closed stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        logging.disable(logged)
    return code


def _analyze(arguments: argparse.Namespace) -> int:
    """Prints a table per model and one of all models; a model that fails does not stop the rest."""
    check_folder("--json", arguments.json)
    if arguments.checkpoint is not None and len(arguments.model) > 1:
        raise UsageError("--checkpoint goes with one MODEL; run fxpath once for each")
    rows, results, code = [], [], 0
    for name in arguments.model:
        try:
            row, result = _analyze_one(name, arguments)
        except UsageError as error:
            _complain(str(error))
            code = 2
        else:
            rows.append(row)
            results.append(result)
    if len(rows) > 1:
        headers = ["model", "parameters", f"path-norm (q={arguments.q})", "seconds"]
        align = ("left", "right", "right", "right")
        print(tabulate(rows, headers=headers, colalign=align, disable_numparse=True))
    if arguments.json is not None:
        _write_json(arguments.json, results)
    return code


def _analyze_one(name: str, arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Prints one model's table; returns its row of the table of all models, and plain data.

    The model and its scores are released on return: the next model may be as large.
    """
    with explained(name, arguments):
        model = load_model(name, arguments.weights, arguments.checkpoint)
        start = time.perf_counter()
        with without_print_outs(arguments):
            analysis = fxpath.analyze(
                model, q=arguments.q, compile=arguments.compile, **model_options(arguments)
            )
    seconds = time.perf_counter() - start
    print(f"{name} ({origin(name, arguments)})\n{analysis}\n", flush=True)
    norm = number(analysis.path_norm, analysis.log10_path_norm)
    row = [name, f"{_count_parameters(model):,}", norm, f"{seconds:.2f}"]
    return row, {"name": name, **analysis.to_dict()}


def _prune(arguments: argparse.Namespace) -> int:
    """Prints what pruning does, and writes the weights that it leaves."""
    if arguments.plan is not None and not arguments.channels:
        raise UsageError("--plan goes with --channels: it says which channels went")
    check_folder("--output", arguments.output)
    check_folder("--plan", arguments.plan)
    verb = fxpath.prune_channels if arguments.channels else fxpath.prune
    with explained(arguments.model, arguments):
        model = load_model(arguments.model, arguments.weights, arguments.checkpoint)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{arguments.model}: pass a module (package.module:callable) to prune")
        options = model_options(arguments)
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
    print(f"{arguments.model} ({origin(arguments.model, arguments)})\n{pruned}\n")
    try:
        if isinstance(pruned, fxpath.PrunedChannels):
            pruned.save(arguments.output)
            if arguments.plan is not None:
                arguments.plan.write_text(pruned.plan.to_json() + "\n", encoding="utf-8")
        else:
            text = pruned.record().to_json()
            save_file(pruned.state_dict, arguments.output, {"format": "pt", MEMBER: text})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--output {arguments.output}: {one_line(error)}") from error
    print(f"written to {arguments.output}")
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
        model = load_model(arguments.model, arguments.weights, arguments.checkpoint)
        with without_print_outs(arguments):
            program = fxpath.compile(model, backend="eager", **model_options(arguments))
    print(f"# input {program.captured.inputs}")
    if arguments.sizes:
        print(_sizes_table(program.sizes()))
    else:
        print(program.graph_module.graph)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Prints the support report."""
    with explained(arguments.model, arguments):
        model = load_model(arguments.model, arguments.weights, arguments.checkpoint)
        with without_print_outs(arguments):
            report = fxpath.check(model, **model_options(arguments))
    print(in_options(str(report)))
    return 0 if report else 2


def _bench(arguments: argparse.Namespace) -> int:
    """Runs the benchmark of pruning criteria, where the package is a source checkout."""
    checkout = Path(fxpath.__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "criteria.py").is_file():
        raise UsageError(
            "the benchmarks are not installed with the package: clone fxpath's repository and run "
            "`python -m benchmarks.criteria` there"
        )
    sys.path.insert(0, str(checkout))
    code: int = importlib.import_module("benchmarks.criteria").main(arguments.rest)
    return code


def _count_parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(path: Path, results: list[dict[str, Any]]) -> None:
    text = json.dumps(finite(results), indent=2, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path}: {one_line(error)}") from error


def _complain(text: str) -> None:
    print(f"fxpath: error: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
