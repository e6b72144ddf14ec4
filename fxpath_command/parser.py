"""The arguments of the command line as plain data, without a look at a model."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fxpath_command import values
from fxpath_command.completion import complete, models
from fxpath_command.terminal import complain
from fxpath_command.words import FORMS

__all__ = ["DOCUMENTS", "make_parser", "parse"]

_FORMS = "A MODEL is one of\n" + "\n".join(f"  {form:<29}{told}" for form, told in FORMS.items())
#: What `analyze` writes besides the table that it prints; FILE may be `-`.
DOCUMENTS = {
    "csv": "write the tables as comma-separated values, all columns and numbers in full",
    "markdown": "write the tables in Markdown",
    "html": "write a report to look at in a browser, of one MODEL",
    "json": "write the results as JSON, a list with an entry for each MODEL",
}
_COMPLETION = """\
Completion by the tab key takes the extra `completion` of torch-fxpath, and in the shell
  eval "$(register-python-argcomplete fxpath)"
"""

_NO_METRIC = "networks with gates have none, leave --gates out"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        self.exit(2)


class _Version(argparse.Action):
    """Looks the version up where it is asked for: that takes longer than all else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import importlib.metadata

        try:
            version = importlib.metadata.version("torch-fxpath")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"fxpath {version}")
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What `fxpath COMMAND ...` asks for; `command` is the name of the command.

    Args:
        argv: The arguments; those of the process by default.

    Raises:
        SystemExit: After `--help` and `--version`, and with one line on standard error and code 2
            for what is no command, option or value.

    Example:
        >>> asked = parse(["analyze", "alexnet", "vgg16", "-q", "2"])
        >>> asked.command, asked.model, asked.q
        ('analyze', ['alexnet', 'vgg16'], 2)
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = make_parser()
    if "_ARGCOMPLETE" in os.environ:
        complete(parser)
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        hint = _close(argv[0], commands) or f"there are {', '.join(commands)}"
        parser.error(f"no command {argv[0]!r}: {hint}")
    arguments, rest = parser.parse_known_args(argv)
    own = commands[arguments.command]
    if rest:
        unknown = next((each for each in rest if each.startswith("-")), None)
        if unknown is not None:
            hint = _close(unknown.partition("=")[0], re.findall(r"--[\w-]+", own.format_help()))
        else:
            hint = "name all MODELs together" if arguments.command == "analyze" else ""
        own.error(f"unrecognized arguments: {' '.join(rest)}" + f"; {hint}" * bool(hint))
    _check(own, arguments)
    return arguments


def _close(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, where something known is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {found[0]}?" if found else ""


def _check(own: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if arguments.command == "analyze" and arguments.checkpoint and len(arguments.model) > 1:
        own.error("--checkpoint goes with one MODEL; run fxpath once for each")
    if arguments.command == "analyze":
        if arguments.html is not None and len(arguments.model) > 1:
            own.error("--html goes with one MODEL; run fxpath once for each")
        _check_apart(own, arguments, list(DOCUMENTS))
    if arguments.command == "compare":
        for option in ("weights", "checkpoint"):
            if getattr(arguments, option) is not None:
                own.error(
                    f"--{option} gives MODEL weights, which count for nothing here: name files"
                )
        _check_apart(own, arguments, ["csv", "plot"])
    if arguments.command == "prune":
        if arguments.plan and not arguments.channels:
            own.error("--plan goes with --channels: it says which channels went")
        if arguments.gates:
            _check_gated(own, arguments)
        _check_apart(own, arguments, ["output", "plan"])
    if arguments.command == "bound" and arguments.gates and arguments.max_relative is not None:
        own.error(f"--max-relative is about the path-metric: {_NO_METRIC}")


def _check_gated(own: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses what needs a path-metric, and what does not take gates in."""
    if arguments.channels:
        own.error("--channels does not take gates in: leave --gates out")
    if arguments.budget is not None:
        own.error(f"--budget is about the path-metric: {_NO_METRIC}, or pass --amount")


def _check_apart(
    own: argparse.ArgumentParser, arguments: argparse.Namespace, options: Iterable[str]
) -> None:
    """Refuses two documents in one file, however it is named."""
    files = [(getattr(arguments, option), option) for option in options]
    asked = [(str(file), option) for file, option in files if file is not None]
    for (file, option), (other, before) in itertools.combinations(asked, 2):
        if values.same_file(file, other):
            names = file if file == other else f"{file}, which is {other}"
            own.error(f"--{option} and --{before} both go to {names}: name two files")


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and that of each command by its name."""
    parser = _Parser(
        prog="fxpath",
        description="Path-norm and Path-Mag of ReLU networks, exact or refused.",
        epilog=f"{_FORMS}\n\n{_COMPLETION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    added: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _common()
    for add in (_analyze, _prune, _graph, _check_command, _export, _verify, _bound, _compare):
        add(added, common)
    return parser, added.choices


def _command(added: Any, common: argparse.ArgumentParser, name: str, told: str) -> Any:
    """A command, which says at the end of its help what a MODEL is."""
    return added.add_parser(
        name,
        parents=[common],
        help=told,
        description=told[0].upper() + told[1:] + ".",
        epilog=_FORMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _model(command: Any, **more: Any) -> None:
    command.add_argument("model", type=values.model, metavar="MODEL", **more).completer = models


def _common() -> argparse.ArgumentParser:
    """What every command takes that is about a model."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--input-shape",
        type=values.shape,
        action="append",
        metavar="3,224,224",
        help="shape of one sample; once per input if there are several, with NAME= for inputs by "
        "name (default: from the model)",
    )
    common.add_argument(
        "--no-batch", action="store_true", help="inputs have no batch axis: shapes are taken as is"
    )
    common.add_argument(
        "--weights",
        metavar="NAME",
        help="torchvision's or timm's own weights, e.g. DEFAULT (default: random)",
    )
    common.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights: .safetensors, its .index.json, or a file of torch.save",
    )
    common.add_argument(
        "--device", metavar="NAME", help="where to compute, e.g. cuda (default: where the model is)"
    )
    common.add_argument("--until", metavar="MODULE", help="stop at the output of this module")
    common.add_argument(
        "--outputs",
        type=values.outputs,
        metavar="0,2",
        help="which outputs count, by position or by key (default: all)",
    )
    common.add_argument(
        "--quiet", action="store_true", help="print nothing but errors: files and exit code count"
    )
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return common


def _gates(command: Any) -> None:
    command.add_argument(
        "--gates",
        action="store_true",
        help="take gates in (SiLU, GELU, tanh, factors like a sigmoid): a generalised path-norm, "
        "without a path-metric and an exact certificate",
    )


def _analyze(added: Any, common: argparse.ArgumentParser) -> None:
    analyze = _command(added, common, "analyze", "path-norm and Path-Mag, a table per layer")
    _model(analyze, nargs="+")
    _gates(analyze)
    analyze.add_argument(
        "-q",
        type=values.exponent,
        default=1,
        metavar="Q",
        help="exponent of the norm (default 1)",
    )
    analyze.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        help="precision (default: float32, or float64 for a model with such parameters)",
    )
    analyze.add_argument(
        "--depth",
        type=values.count,
        metavar="N",
        help="sums by module, down to this depth of dotted names, in tables that are printed or "
        "written",
    )
    analyze.add_argument(
        "--top",
        type=values.count,
        metavar="N",
        help="print the N layers alone whose parameters carry the least path mass each, the least "
        "first; files have all",
    )
    files = analyze.add_argument_group(
        "files", "With - for FILE it goes to standard output, in place of the table there."
    )
    for option, told in DOCUMENTS.items():
        files.add_argument(f"--{option}", type=values.document, metavar="FILE", help=told)
    analyze.add_argument("--compile", action="store_true", help="compile the graph with Inductor")


def _prune(added: Any, common: argparse.ArgumentParser) -> None:
    prune = _command(added, common, "prune", "set weights to zero, or remove channels")
    _model(prune)
    _gates(prune)
    how_much = prune.add_mutually_exclusive_group(required=True)
    how_much.add_argument(
        "--amount",
        type=values.amount,
        metavar="0.4",
        help="share (with a point) or number of the entries, or of the channels, that go",
    )
    how_much.add_argument(
        "--budget",
        type=values.number,
        metavar="0.01",
        help="the largest part of the path-norm that may be lost, by the exact path-metric",
    )
    prune.add_argument(
        "--criterion",
        default="path_magnitude",
        metavar="NAME",
        help="path_magnitude (default), canonical_magnitude or magnitude",
    )
    prune.add_argument(
        "--channels", action="store_true", help="remove whole channels: a smaller network"
    )
    prune.add_argument(
        "-o",
        "--output",
        type=values.target,
        required=True,
        metavar="FILE",
        help="where the weights go, as .safetensors",
    )
    prune.add_argument(
        "--plan", type=values.target, metavar="FILE", help="write which channels went, as JSON"
    )


def _graph(added: Any, common: argparse.ArgumentParser) -> None:
    graph = _command(added, common, "graph", "print the rewritten graph")
    _model(graph)
    _gates(graph)
    graph.add_argument(
        "--sizes",
        action="store_true",
        help="print extents and multiply-adds of each activation, at full resolution and as kept",
    )


def _check_command(added: Any, common: argparse.ArgumentParser) -> None:
    told = "what stands in the way of an exact result, if any"
    check = _command(added, common, "check", told)
    _model(check)
    _gates(check)


def _export(added: Any, common: argparse.ArgumentParser) -> None:
    export = _command(added, common, "export", "write a program that computes path-norm and scores")
    _model(export)
    export.add_argument(
        "-o",
        "--output",
        type=values.target,
        required=True,
        metavar="FILE",
        help="a .pt2 file, for torch.export.load, or .onnx",
    )
    export.add_argument("--norm-only", action="store_true", help="leave the scores out")
    export.add_argument(
        "--aoti", action="store_true", help="compile the .pt2 with AOTInductor, for this machine"
    )


def _verify(added: Any, common: argparse.ArgumentParser) -> None:
    told = "compute the certificate in a file anew; exit code 1 if it does not hold"
    verify = _command(added, common, "verify", told)
    _model(verify, help="what the file was made from")
    verify.add_argument(
        "file", type=Path, metavar="FILE", help=".pt2, .onnx, .safetensors or .json"
    )


def _bound(added: Any, common: argparse.ArgumentParser) -> None:
    told = "how far two sets of weights are apart; exit code 1 beyond --max-relative"
    bound = _command(added, common, "bound", told)
    _model(bound)
    _gates(bound)
    bound.add_argument(
        "other",
        type=values.model,
        metavar="OTHER",
        help="a MODEL of the same architecture, or a file of weights",
    ).completer = models
    bound.add_argument(
        "--radius",
        type=values.number,
        default=1.0,
        metavar="R",
        help="the outputs are compared where no entry of the input is beyond it (default 1)",
    )
    bound.add_argument(
        "--max-relative",
        type=values.number,
        metavar="0.01",
        help="the largest path-metric that is accepted, as a part of the path-norm of MODEL",
    )


_COMPARED = """\
Files are compared in the order in which they are named (`$(ls -v run/*.pt)` sorts by number), and
read one at a time. A file that does not hold exactly the tensors of MODEL has no row: it is named
at the end, and the exit code is 2.

With --csv rows are written as they are made, and an interrupted run goes on where it stopped if the
same command is run again: rows count whose files, and the ones before them, have the size and the
time of change that they had. A table of another MODEL, reference or option is refused, never mixed.

Under torchrun the list is shared out, and rank 0 writes and prints:
  torchrun --nproc-per-node=4 -m fxpath compare MODEL CHECKPOINT... --csv FILE
"""


def _compare(added: Any, common: argparse.ArgumentParser) -> None:
    told = "path-norms of many checkpoints, and how far they are apart"
    compare = _command(added, common, "compare", told)
    compare.epilog = f"{_COMPARED}\n{_FORMS}"
    _model(compare)
    compare.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="files of weights of MODEL: .safetensors, .index.json, or of torch.save",
    )
    compare.add_argument(
        "--reference", metavar="FILE", help="what all are compared with (default: the first one)"
    )
    compare.add_argument(
        "--radius",
        type=values.number,
        default=1.0,
        metavar="R",
        help="outputs are compared where no entry of the input is beyond it (default 1)",
    )
    compare.add_argument(
        "--csv",
        type=values.target,
        metavar="FILE",
        help="write the rows as they are made, and go on with those that are there",
    )
    compare.add_argument(
        "--plot", type=values.target, metavar="FILE", help="draw path-norm and metrics, e.g. a .png"
    )
