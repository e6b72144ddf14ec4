"""Arguments of the command line: how they are parsed, and the API's messages in their words."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fxpath.capture.loading import KINDS, UsageError

__all__ = ["Command", "in_options", "make_parser", "model_options"]

Command = Callable[[argparse.Namespace], int]


def in_options(text: str) -> str:
    """A message about arguments of the API in the words of the command line.

    Example:
        >>> in_options("pass input_shape=(3, 224, 224), or until='features'")
        "pass --input-shape 3,224,224, or --until 'features'"
        >>> in_options("pass input_shape=[(3, 8), (4,)] or batch_dim=None")
        'pass --input-shape 3,8 --input-shape 4 or --no-batch'
    """
    text = re.sub(
        r"input_shape=\[((\([\d, ]+\)(, )?)+)\]",
        lambda m: " ".join(f"input_shape={shape}" for shape in re.findall(r"\([\d, ]+\)", m[1])),
        text,
    )
    text = re.sub(
        r"input_shape=\(([\d, ]+)\)",
        lambda m: "--input-shape " + m[1].replace(" ", "").rstrip(","),
        text,
    )
    for said, option in (
        ("input_shape=(...)", "--input-shape N,N,..."),
        ("input_shape={name: shape}", "--input-shape NAME=N,N,..."),
        ("input_shape=", "--input-shape "),
        ("input_shape/example_inputs", "--input-shape"),
        ('until="..."', "--until MODULE"),
        ("until=", "--until "),
        ("outputs=", "--outputs "),
        ("batch_dim=None", "--no-batch"),
        (", or example_inputs", ""),
    ):
        text = text.replace(said, option)
    return re.sub(r"(?<![-\w])input_shape\b", "--input-shape", text)


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `fxpath.analyze`, `fxpath.compile` and `fxpath.check`."""
    options: dict[str, Any] = {"until": arguments.until, "outputs": arguments.outputs}
    if arguments.no_batch:
        options["batch_dim"] = None
    shapes = arguments.input_shape or []
    named = dict(shape for shape in shapes if isinstance(shape[0], str))
    if named and len(named) < len(shapes):
        raise UsageError("--input-shape: name all inputs, each once, or none")
    if shapes:
        options["input_shape"] = named or (shapes[0] if len(shapes) == 1 else shapes)
    return options


def _parse_shape(text: str) -> tuple[int, ...] | tuple[str, tuple[int, ...]]:
    name, named, lengths = text.rpartition("=")
    try:
        shape = tuple(int(part) for part in lengths.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or (named and not name.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: positive numbers with commas and without the batch axis, as in 3,224,224 "
            "or image=3,224,224"
        )
    return (name, shape) if named else shape


def _parse_outputs(text: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in text.split(",")]


def _parse_exponent(text: str) -> float:
    try:
        q = float(text)
    except ValueError:
        q = -1.0
    if not 0 <= q < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number that is not negative, as in 2")
    return int(q) if q.is_integer() else q


def _parse_amount(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a share as in 0.4, or a number") from None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fxpath: error: {message} (see {self.prog} --help)\n")


def _version() -> str:
    try:
        return importlib.metadata.version("torch-fxpath")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def add_exchange(added: Any, common: _Parser, commands: Mapping[str, Command]) -> None:
    """The commands that write and read what other tools share."""
    export = added.add_parser(
        "export", parents=[common], help="write a program that computes path-norm and scores"
    )
    export.add_argument("model", metavar="MODEL", help=KINDS)
    export.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .pt2 file, for torch.export.load, or .onnx",
    )
    export.add_argument("--norm-only", action="store_true", help="leave the scores out")
    export.add_argument(
        "--aoti", action="store_true", help="compile the .pt2 with AOTInductor, for this machine"
    )
    export.set_defaults(command=commands["export"])

    verify = added.add_parser(
        "verify",
        parents=[common],
        help="compute the certificate in a file anew; exit code 1 if it does not hold",
    )
    verify.add_argument(
        "model", metavar="MODEL", help=f"what the file was made from: {KINDS.removeprefix('a ')}"
    )
    verify.add_argument(
        "file", type=Path, metavar="FILE", help=".pt2, .onnx, .safetensors or .json"
    )
    verify.set_defaults(command=commands["verify"])

    bound = added.add_parser(
        "bound",
        parents=[common],
        help="how far two sets of weights are apart; exit code 1 beyond --max-relative",
    )
    bound.add_argument("model", metavar="MODEL", help=KINDS)
    bound.add_argument(
        "other", metavar="OTHER", help="a MODEL of the same architecture, or a file of weights"
    )
    bound.add_argument(
        "--radius",
        type=float,
        default=1.0,
        metavar="R",
        help="the outputs are compared where no entry of the input is beyond it (default 1)",
    )
    bound.add_argument(
        "--max-relative",
        type=float,
        metavar="0.01",
        help="the largest path-metric that is accepted, as a part of the path-norm of MODEL",
    )
    bound.set_defaults(command=commands["bound"])


def make_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of `fxpath COMMAND ...`, whose namespace holds the command to run."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--input-shape",
        type=_parse_shape,
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
        help="torchvision's own weights, e.g. DEFAULT (default: random)",
    )
    common.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights: .safetensors, its .index.json, or a file of torch.save",
    )
    common.add_argument("--until", metavar="MODULE", help="stop at the output of this module")
    common.add_argument(
        "--outputs",
        type=_parse_outputs,
        metavar="0,2",
        help="which outputs count, by position or by key (default: all)",
    )
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    parser = _Parser(
        prog="fxpath",
        description="Path-norm and Path-Mag of ReLU networks, exact or refused.",
        epilog=f"A{KINDS[1:]}.",
    )
    parser.add_argument("--version", action="version", version=f"fxpath {_version()}")
    added = parser.add_subparsers(required=True, metavar="COMMAND")

    analyze = added.add_parser("analyze", parents=[common], help="path-norm and Path-Mag")
    analyze.add_argument("model", nargs="+", metavar="MODEL", help=KINDS)
    analyze.add_argument(
        "-q", type=_parse_exponent, default=1, metavar="Q", help="exponent of the norm (default 1)"
    )
    analyze.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    analyze.add_argument("--compile", action="store_true", help="compile the graph with Inductor")
    analyze.set_defaults(command=commands["analyze"])

    graph = added.add_parser("graph", parents=[common], help="print the rewritten graph")
    graph.add_argument("model", metavar="MODEL", help=KINDS)
    graph.add_argument(
        "--sizes",
        action="store_true",
        help="print extents and multiply-adds of each activation, at full resolution and as kept",
    )
    graph.set_defaults(command=commands["graph"])

    check = added.add_parser("check", parents=[common], help="print the support report")
    check.add_argument("model", metavar="MODEL", help=KINDS)
    check.set_defaults(command=commands["check"])

    prune = added.add_parser(
        "prune", parents=[common], help="set weights to zero, or remove channels"
    )
    prune.add_argument("model", metavar="MODEL", help=KINDS)
    how_much = prune.add_mutually_exclusive_group(required=True)
    how_much.add_argument(
        "--amount",
        type=_parse_amount,
        metavar="0.4",
        help="share (with a point) or number of the entries, or of the channels, that go",
    )
    how_much.add_argument(
        "--budget",
        type=float,
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
        type=Path,
        required=True,
        metavar="FILE",
        help="where the weights go, as .safetensors",
    )
    prune.add_argument(
        "--plan", type=Path, metavar="FILE", help="write which channels went, as JSON"
    )
    prune.set_defaults(command=commands["prune"])

    add_exchange(added, common, commands)

    # Its options are the benchmark's own.
    bench = added.add_parser(
        "bench", add_help=False, help="time pruning criteria as in the paper's Table 3"
    )
    bench.set_defaults(command=commands["bench"], traceback=True)
    return parser
