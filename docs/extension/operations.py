"""Tables of the operations that have a rule, and of those that are refused, from the rules.

``{operations} NAME`` lists the rules of the module ``fxpath.rules.NAME``, ``{gated}`` those that
count where gates are taken in, ``{gates}`` activations with their sizes and Lipschitz constants,
``{refusals}`` what is refused with the reason.  Nothing is written down here: what the package
knows is what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from docutils import nodes
from docutils.parsers.rst import Directive

from fxpath.graph.squashes import SQUASHES
from fxpath.private import schema
from fxpath.rules import GATED, RULES
from fxpath.rules.refused import EXPLAINED

__all__ = ["activations", "gated", "refusals", "setup", "supported"]

#: One row of cells; a cell is a text, or words in code.
Row = tuple[str | list[str], ...]


def supported(module: str) -> list[list[str]]:
    """The overloads that each rule of one module is for."""
    found: dict[Any, list[str]] = {}
    for overload, rule in RULES.items():
        if rule.__module__ == f"fxpath.rules.{module}":
            found.setdefault(rule, []).append(str(overload))
    return list(found.values())


def gated() -> list[list[str]]:
    """The overloads that each rule is for that counts where gates are taken in."""
    found: dict[Any, list[str]] = {}
    for overload, rule in GATED.items():
        found.setdefault(rule, []).append(str(overload))
    return list(found.values())


def activations() -> list[tuple[str, str, str, str, str]]:
    """Activations that are gates: name, c, L, range and why, with torch's default arguments."""
    found = []
    for name, make in SQUASHES.items():
        known = make(0) if name == "softmax" else make()
        assert known is not None
        size = "none" if known.size is None else f"{known.size:.6g}"
        lipschitz = "none, it jumps" if math.isinf(known.lipschitz) else f"{known.lipschitz:.6g}"
        limits = f"{_limit(known.low)} to {_limit(known.high)}"
        found.append((name, size, lipschitz, limits, known.proof))
    return found


def _limit(value: float) -> str:
    return f"{value:.5g}".replace("inf", "∞").replace("-", "−")


def refusals() -> list[tuple[list[str], str, str]]:
    """Operations that are refused for one reason, the reason, and what can be done."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, reason in EXPLAINED.items():
        if _without_rule(name):
            found.setdefault(reason, []).append(name)
    return [(names, *reason) for reason, names in found.items()]


def _without_rule(name: str) -> bool:
    """Whether some form of an operation that returns its result has no rule."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return True
    every = [getattr(packet, each) for each in packet.overloads()]
    return any(each not in RULES and not schema(each).is_mutable for each in every)


class Operations(Directive):
    """The rules of one module as a table."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One row for each rule."""
        found = supported(self.arguments[0])
        if not found:
            raise self.error(f"fxpath.rules.{self.arguments[0]} has no rule")
        rows: list[Row] = [(_short(each),) for each in found]
        return [_table(("ATen overloads of one rule",), (100,), rows)]


class Gated(Directive):
    """The rules that count where gates are taken in, as a table."""

    def run(self) -> list[nodes.Node]:
        """One row for each rule."""
        rows: list[Row] = [(_short(each),) for each in gated()]
        return [_table(("ATen overloads of one rule",), (100,), rows)]


class Gates(Directive):
    """Activations that are gates, as a table."""

    def run(self) -> list[nodes.Node]:
        """One row for each activation."""
        heads = ("activation", "c", "L", "range", "why")
        rows: list[Row] = [([name], *rest) for name, *rest in activations()]
        return [_table(heads, (15, 12, 15, 18, 40), rows)]


class Refusals(Directive):
    """What is refused, as a table."""

    def run(self) -> list[nodes.Node]:
        """One row for each reason."""
        heads = ("operation", "why it is refused", "what to do")
        return [_table(heads, (40, 30, 30), refusals())]


def _short(overloads: Iterable[str]) -> list[str]:
    """Overloads of one operation in one word, as ``aten.to.{dtype,other}``."""
    found: dict[str, list[str]] = {}
    for each in overloads:
        name, _, overload = each.rpartition(".")
        found.setdefault(name, []).append(overload)
    return [
        f"{name}.{each[0] if len(each) == 1 else '{' + ','.join(each) + '}'}"
        for name, each in found.items()
    ]


def _table(heads: Sequence[str], widths: Sequence[int], rows: Iterable[Row]) -> nodes.table:
    group = nodes.tgroup(cols=len(heads))
    group += [nodes.colspec(colwidth=width) for width in widths]
    head = nodes.thead()
    head += _row(heads)
    body = nodes.tbody()
    body += [_row(row) for row in rows]
    group += [head, body]
    table = nodes.table(classes=["operations"])
    table += group
    return table


def _row(cells: Sequence[str | list[str]]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        paragraph = nodes.paragraph()
        if isinstance(cell, str):
            paragraph += nodes.Text(cell)
        else:
            for i, word in enumerate(cell):
                if i:
                    paragraph += nodes.Text(" ")
                paragraph += nodes.literal(text=word)
        entry = nodes.entry()
        entry += paragraph
        row += entry
    return row


def setup(app: Any) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("operations", Operations)
    app.add_directive("gated", Gated)
    app.add_directive("gates", Gates)
    app.add_directive("refusals", Refusals)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
