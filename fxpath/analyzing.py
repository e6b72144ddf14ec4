"""The command `analyze`: a table per model, and documents of all of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxpath
from fxpath.capture.loading import UsageError, one_line
from fxpath.explaining import explained, heading, load, number, origin, say, without_print_outs
from fxpath.options import in_options, model_options
from fxpath.program.analysis import Analysis, shortened
from fxpath.report.page import page
from fxpath.report.plain import json_text
from fxpath.report.table import Column, Table
from fxpath_command.parser import DOCUMENTS
from fxpath_command.terminal import complain, styled

__all__ = ["analyze"]


@dataclasses.dataclass(frozen=True)
class _Result:
    """What is kept of one model, whose scores may be as large as the next one.

    Attributes:
        line: its row of the table of all models.
        data: for JSON.
        table: one row for each layer, or each module.
        page: for a browser, if one is asked for.
    """

    name: str
    line: list[str]
    data: dict[str, Any]
    table: Table
    page: str | None


def analyze(arguments: argparse.Namespace) -> int:
    """Prints a table per model and one of all models; a model that fails does not stop the rest."""
    results: list[_Result] = []
    count = len(arguments.model)
    with _apart(arguments):
        for position, name in enumerate(arguments.model, 1):
            try:
                place = f"{position} of {count}: " if count > 1 else ""
                results.append(_analyze(name, arguments, place))
            except UsageError as error:
                complain(str(error))
        if len(results) > 1:
            headers = ["model", "parameters", f"path-norm (q={arguments.q})", "seconds"]
            lines, align = [result.line for result in results], ("left", "right", "right", "right")
            table = tabulate(lines, headers=headers, colalign=align, disable_numparse=True)
            _say(arguments, table)
    _write("json", arguments.json, json_text([result.data for result in results]))
    if results:
        joined = results[0].table if count == 1 else _joined(results)
        _write("csv", arguments.csv, joined.to_csv())
        _write("markdown", arguments.markdown, joined.to_markdown())
        _write("html", arguments.html, results[0].page or "")
    return 0 if len(results) == count else 2


def _analyze(name: str, arguments: argparse.Namespace, place: str) -> _Result:
    """Prints one model's table."""
    with explained(name, arguments, place):
        model = load(name, arguments, arguments.weights, arguments.checkpoint)
        start = time.perf_counter()
        with without_print_outs(arguments):
            analysis = fxpath.analyze(
                model,
                q=arguments.q,
                dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
                compile=arguments.compile,
                **model_options(arguments),
            )
        seconds = time.perf_counter() - start
        table = analysis.table(arguments.depth)
    _say(arguments, f"{heading(name, arguments)}\n{_text(analysis, table, arguments.top)}\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norm = number(analysis.path_norm, analysis.log10_path_norm)
    norm += " (generalised)" * bool(analysis.gates)
    return _Result(
        name,
        [name, f"{parameters:,}", norm, f"{seconds:.2f}"],
        {"name": name, **analysis.to_dict()},
        table,
        None if arguments.html is None else page(_titled(analysis.report(), name, arguments)),
    )


def _titled(report: dict[str, Any], name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A report that says of which model and which weights it is."""
    return {**report, "title": f"{name}: {report['title']} ({origin(name, arguments)})"}


def _text(analysis: Analysis, table: Table, top: int | None) -> str:
    """What `print(analysis)` shows, with these rows and with its findings in colour."""
    table = shortened(table if top is None else _least(table, top))
    taken = textwrap.wrap(analysis.gates_line(), 100, break_on_hyphens=False)
    lines = [table.title, in_options(analysis.input_line()), *taken, "", str(table), ""]
    lines += textwrap.wrap(table.legend(), 100)
    said = [line for finding in analysis.findings for line in textwrap.wrap(finding.text, 100)]
    return "\n".join(
        [*lines, *[""] * bool(said), *(styled(t, "finding", sys.stdout) for t in said)]
    )


def _least(table: Table, count: int) -> Table:
    """The rows whose parameters carry the least path mass each, with the column that says so.

    It stands in the place of the shapes: no line is longer than 100 letters.
    """
    key, shown = "per_parameter", {"per_parameter": True, "shape": False}
    columns = (
        dataclasses.replace(column, shown=shown.get(column.name, column.shown))
        for column in table.columns
    )
    rows = sorted(table.rows, key=lambda row: row[key])[:count]
    return dataclasses.replace(table, columns=tuple(columns), rows=tuple(rows))


def _joined(results: Sequence[_Result]) -> Table:
    """The tables of several models as one, which names the model in each row."""
    columns = (Column("model", "model", "text", ""), *results[0].table.columns)
    rows = [{"model": result.name, **row} for result in results for row in result.table.rows]
    return Table("models", columns, tuple(rows))


def _piped(arguments: argparse.Namespace) -> bool:
    """Whether standard output is a document."""
    return any(getattr(arguments, option) == "-" for option in DOCUMENTS)


def _say(arguments: argparse.Namespace, text: object) -> None:
    if not _piped(arguments):
        say(arguments, text)


@contextlib.contextmanager
def _apart(arguments: argparse.Namespace) -> Iterator[None]:
    """Keeps what the user's own code prints out of a document on standard output."""
    with contextlib.ExitStack() as stack:
        if _piped(arguments):
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _write(option: str, file: str | None, text: str) -> None:
    """Writes a document, if it is asked for, to a file or to standard output for `-`."""
    if file is None:
        return
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--{option} {file}: {one_line(error)}") from error
