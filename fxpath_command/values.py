"""Values of options from their text; what is wrong with one is said with an example."""

from __future__ import annotations

import argparse
import ast
import math
import os
from pathlib import Path

__all__ = [
    "amount",
    "count",
    "document",
    "exponent",
    "makers",
    "model",
    "number",
    "outputs",
    "same_file",
    "shape",
    "target",
]


def shape(text: str) -> tuple[int, ...] | tuple[str, tuple[int, ...]]:
    """`3,224,224`, or `image=3,224,224` for an input by name."""
    name, named, lengths = text.rpartition("=")
    try:
        found = tuple(int(part) for part in lengths.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or (named and not name.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: positive numbers with commas and without the batch axis, as in 3,224,224 "
            "or image=3,224,224"
        )
    return (name, found) if named else found


def outputs(text: str) -> list[int | str]:
    """`0,2`, by position or by key."""
    return [int(part) if part.isdecimal() else part for part in text.split(",")]


def exponent(text: str) -> float:
    """A number that is not negative."""
    try:
        q = float(text)
    except ValueError:
        q = -1.0
    if not 0 <= q < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number that is not negative, as in 2")
    return int(q) if q.is_integer() else q


def number(text: str) -> float:
    """Any number, in digits: what it may be is the command's to say."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a number, as in 0.01 for one per cent"
        ) from None


def amount(text: str) -> float | int:
    """A share with a point, or a number without."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a share as in 0.4, or a number") from None


def count(text: str) -> int:
    """A number of things, one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1 on, as in 10")
    return int(text)


def target(text: str) -> Path:
    """A file to write, refused before anything is computed if its folder is not there."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: a directory, not a file")
    return path


def document(text: str) -> str:
    """A file to write, or `-` for standard output."""
    if text != "-":
        target(text)
    return text


def same_file(a: str, b: str) -> bool:
    """Whether two documents go to one place: by whatever path, through links of both kinds.

    Example:
        >>> same_file("a.csv", "./a.csv"), same_file("-", "./-")
        (True, False)
    """
    if "-" in (a, b):
        return a == b
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def model(text: str) -> str:
    """A MODEL as it is, but for a file of Python without a word on what in it makes the model."""
    if text.endswith(".py"):
        found = makers(Path(text))
        like = f", as in {text}:{found[0]}" if found else ""
        raise argparse.ArgumentTypeError(f"{text}: say what makes the model: {text}:callable{like}")
    return text


def makers(path: Path) -> list[str]:
    """What at the top of a file can be called without arguments; it is read and not run."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
    return [
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and len(node.args.posonlyargs + node.args.args) == len(node.args.defaults)
        and None not in node.args.kw_defaults
    ]
