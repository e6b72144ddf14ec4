"""The sections of the page, each from the part of the report that it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxpath.report.markup import Markup, element, join
from fxpath.report.modules import Module, nest, sums, walk
from fxpath.report.table import shown

#: So many rows of the tree of modules are open at first.
_OPEN = 60
#: So many layers of a finding are named before the rest is folded away.
_NAMED = 8
#: Parts of the path-norm for which the curve is put into words.
_LOSSES = (0.01, 0.1)
#: What kinds of findings are called.
_KINDS = {
    "uncrossed": "Layers that nearly no path mass crosses",
    "dead_channels": "Dead channels",
    "concentrated": "Scores on few weights",
    "emptied": "What pruning empties first",
    "unscored": "Parameters without a score",
}
_MODULES = (
    "Share: the part of all path mass that crosses a layer; of a module the mean over its layers, "
    "which is the part of them that a path crosses on average. Spread: over how many of the "
    "weights the mass is spread (exp of the entropy of their scores), as a part of them; 100% "
    "where all weights have the same score."
)
_PRUNING = (
    "Global pruning by Path-Mag: what is lost of the {norm} at most, by the bound (13) of the "
    "paper, which needs nothing but the scores. More than all cannot be lost: larger bounds are "
    "shown as 100%."
)
#: With gates what is lost of the norm says nothing of outputs.
_NO_CERTIFICATE = " It is no certificate: gates change as well, and outputs with them."


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own.

    Attributes:
        name: what links within the page go to.
        title: the heading.
        body: what is below it.
    """

    name: str
    title: str
    body: Markup


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The sections of a report in order, without those that would be empty."""
    makers = (_findings, _modules, _layers, _pruning, _table, _gates, _unscored)
    return [section for section in (make(report) for make in makers) if section is not None]


def capped(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """A curve of bounds on a part; a part is 1 at most."""
    return [(pruned, min(1.0, bound)) for pruned, bound in curve]


def pairs(of: Sequence[Sequence[str]], class_: str) -> Markup:
    """Names with what they stand for, as a list."""
    items = [element("div", element("dt", name), element("dd", text)) for name, text in of]
    return element("dl", *items, class_=class_)


def _findings(report: Mapping[str, Any]) -> Section:
    index = {row["layer"]: i for i, row in enumerate(report["rows"])}
    items = [
        element(
            "li",
            element("h3", _KINDS.get(finding["kind"], finding["kind"])),
            element("p", finding["text"]),
            _named([name for name in finding["layers"] if name in index], index),
        )
        for finding in report["findings"]
    ]
    none = element("p", "Nothing stands out.", class_="about")
    found = element("ul", *items, class_="findings") if items else none
    return Section("findings", "What the numbers say", found)


def _named(layers: Sequence[str], index: Mapping[str, int]) -> Markup:
    """Links to layers, the first few of them open."""
    items = [element("li", _link(name, index[name])) for name in layers]
    first, rest = items[:_NAMED], items[_NAMED:]
    if not first:
        return Markup()
    more = element(
        "details",
        element("summary", f"and {len(rest)} more"),
        element("ul", *rest, class_="names"),
    )
    return join(element("ul", *first, class_="names"), more if rest else "")


def _link(text: str, index: int) -> Markup:
    """A link that chooses a layer and goes to what is said of it; long names break at dots."""
    first, *rest = (text or "(model)").split(".")
    broken = [join(element("wbr"), f".{part}") for part in rest]
    return element("a", first, *broken, href="#layer", data_row=index)


def _modules(report: Mapping[str, Any]) -> Section | None:
    rows = report["rows"]
    if not rows:
        return None
    tree = nest([row["layer"] for row in rows])
    depths = [depth for depth, _ in walk(tree)]
    # The outer levels are open as far as they leave the tree at a glance.
    level = max((d for d in set(depths) if sum(e <= d for e in depths) <= _OPEN), default=1)
    heading = element(
        "div",
        element("span", "module"),
        element("span", "parameters", class_="number"),
        element("span", "share"),
        element("span", "spread"),
        class_="tree-row tree-head",
        aria_hidden="true",
    )
    buttons = element(
        "p",
        element("button", "Open all", type="button", id="open-all"),
        element("button", "Close all", type="button", id="close-all"),
        class_="controls scripted",
    )
    body = join(
        element("p", _MODULES, class_="about"),
        buttons if any(module.parts for module in tree) else "",
        element("div", heading, _branch(tree, report, level), class_="tree"),
    )
    return Section("modules", "Modules", body)


def _branch(
    parts: Sequence[Module], report: Mapping[str, Any], level: int, depth: int = 1
) -> Markup:
    items = []
    for part in parts:
        inside = [report["rows"][i] for i in part.layers]
        measures = _measures(inside, report["weights"])
        if part.parts:
            name = element("span", part.name, " ", element("small", f"{len(inside)} layers"))
            line = element("summary", name, *measures, class_="tree-row")
            inner = _branch(part.parts, report, level, depth + 1)
            items.append(element("details", line, inner, open=depth < level))
        else:
            operation = element("small", inside[0]["operation"])
            name = element("span", _link(part.name, part.layers[0]), " ", operation)
            items.append(element("div", name, *measures, class_="tree-row leaf"))
    return element("ul", *(element("li", item) for item in items))


def _measures(
    rows: Sequence[Mapping[str, Any]], weights: Mapping[str, tuple[int, float]]
) -> Iterator[Markup]:
    """Parameters, share and spread of what is in a module."""
    found = sums(rows, [weights[row["layer"]] for row in rows])
    yield element(
        "span", shown(found["parameters"], "count"), _aside(" parameters"), class_="number"
    )
    for name, said in (("share", "share"), ("effective_part", "spread")):
        width = f"{100 * min(1.0, found[name]):.4g}%"
        bar = element("rect", width=width, height="100%", class_=name)
        yield element(
            "span",
            element("svg", bar, class_="bar", aria_hidden="true"),
            element("span", _aside(f"{said} "), shown(found[name], "part"), class_="number"),
            class_="measure",
        )


def _aside(text: str) -> Markup:
    """For those who hear the page, where others see the place of a number."""
    return element("span", text, class_="aside")


def _layers(report: Mapping[str, Any]) -> Section | None:
    rows = report["rows"]
    if not rows:
        return None
    drawn = [column for column in report["columns"] if column["kind"] != "text"]
    quantities = [
        element("option", c["heading"], value=c["name"], selected=c["name"] == "effective_part")
        for c in drawn
    ]
    names = [element("option", row["layer"] or "(model)", value=i) for i, row in enumerate(rows)]
    choices = element(
        "div",
        element("label", "Layer ", element("select", *names, id="choose-layer")),
        element(
            "span",
            element("button", "Previous", type="button", id="previous"),
            element("button", "Next", type="button", id="next"),
            class_="pair",
        ),
        element("label", "Quantity ", element("select", *quantities, id="choose-quantity")),
        class_="controls",
    )
    detail = element(
        "div",
        element("h3", "", id="layer-name"),
        element("div", element("div", id="histogram", class_="chart"), element("dl", id="values")),
        id="layer",
        tabindex=-1,
    )
    charts = element(
        "div",
        choices,
        element("p", "", id="readout", class_="readout", role="status"),
        element("div", id="quantity", class_="chart"),
        element("div", id="spread", class_="chart"),
        detail,
        class_="scripted",
    )
    body = join(
        element(
            "p",
            "In order of execution. A click on a picture chooses the layer below it, and so do the "
            "names in this page. The table has the same numbers.",
            class_="about",
        ),
        _no_script(),
        charts,
    )
    return Section("layers", "Layers", body)


def _pruning(report: Mapping[str, Any]) -> Section | None:
    curve = capped(report["curve"])
    if not curve:
        return None
    norm = report["norm"]
    title = f"Sparsity against {norm}" if report["gates"] else "Sparsity against certificate"
    rows = [
        element(
            "tr",
            element("th", f"{pruned:.2%}", scope="row", class_="number"),
            element("td", _lost(bound), class_="number"),
        )
        for pruned, bound in curve
    ]
    headings = [
        element("th", text, scope="col", class_="number")
        for text in ("weights pruned", f"{norm} lost, at most")
    ]
    head, lines = element("thead", element("tr", *headings)), element("tbody", *rows)
    values = element("table", head, lines, id="curve-values")
    log = element("input", type="checkbox", id="logarithmic")
    slider = element("input", type="range", id="pruned", min=0, max=len(curve) - 1)
    chart = element(
        "div",
        element("label", log, " Logarithmic axis"),
        element("div", element("div", id="curve", class_="chart")),
        element("label", "Weights pruned ", slider),
        element("output", "", id="lost", for_="pruned"),
        class_="scripted",
    )
    folded = element(
        "details",
        element("summary", "The curve as a table"),
        _scrolling(values, title),
    )
    means = _PRUNING.format(norm=norm) + _NO_CERTIFICATE * bool(report["gates"])
    about = element("p", means, class_="about")
    said = element("p", text) if (text := _said(curve, norm)) else ""
    body = join(about, said, _no_script(), chart, folded)
    return Section("pruning", title, body)


def _said(curve: Sequence[tuple[float, float]], norm: str) -> str:
    """How much can be pruned for a small loss, never rounded up."""
    texts = []
    for loss in _LOSSES:
        pruned = max((pruned for pruned, bound in curve if bound <= loss), default=0.0)
        if thousandths := math.floor(1000 * pruned):
            texts.append(f"{thousandths / 1000:.1%} of the weights cost at most {loss:.0%}")
    return ", ".join(texts) + f" of the {norm}." if texts else ""


def _lost(bound: float) -> str:
    """A part in per cent, with two digits of those that are small."""
    return f"{bound:.2%}" if bound >= 0.001 or not bound else f"{100 * bound:.1e}%"


def _table(report: Mapping[str, Any]) -> Section | None:
    columns, rows = report["columns"], report["rows"]
    if not rows:
        return None
    headings = [
        element(
            "th",
            element("button", c["heading"], type="button", title=c["about"]),
            scope="col",
            aria_sort="none",
            class_=_aligned(c["kind"]),
        )
        for c in columns
    ]
    lines = [element("tr", *_cells(row, columns, i), data_row=i) for i, row in enumerate(rows)]
    table = element(
        "table",
        element("caption", "Layers, in order of execution until sorted", class_="unseen"),
        element("thead", element("tr", *headings)),
        element("tbody", *lines),
        id="rows",
    )
    search = element("input", type="search", id="filter", autocomplete="off", spellcheck="false")
    count = f"{len(rows)} of {len(rows)} layers"
    controls = element(
        "div",
        element("label", "Filter ", search),
        element("span", count, id="count", role="status"),
        class_="controls scripted",
    )
    meanings = element(
        "details",
        element("summary", "What the columns mean"),
        pairs([(c["heading"], c["about"]) for c in columns if c["about"]], class_="meanings"),
    )
    body = join(controls, _scrolling(table, "Table of layers"), meanings)
    return Section("table", "Table", body)


def _cells(
    row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], index: int
) -> Iterator[Markup]:
    for place, column in enumerate(columns):
        text = shown(row[column["name"]], column["kind"])
        if place:
            yield element("td", text, class_=_aligned(column["kind"]))
        else:
            yield element("th", _link(text, index), scope="row")


def _gates(report: Mapping[str, Any]) -> Section | None:
    gates = report["gates"]
    if not gates:
        return None
    title = "Gates on the paths"
    heads = ("module", "operation", "at most", "signal", "gate", "source")
    rows = [
        (
            *(gate["module_path"] or "(model)", gate["operation"], shown(gate["size"], "number")),
            *(gate["signal"], gate["factor"], gate["source_line"]),
        )
        for gate in gates
    ]
    body = join(
        element("p", report["about_gates"], class_="about"),
        _folded(f"{len(gates)} gates", title, heads, rows),
    )
    return Section("gates", title, body)


def _unscored(report: Mapping[str, Any]) -> Section | None:
    unscored = report["unscored"]
    if not unscored:
        return None
    title = "Parameters without a score"
    reasons: dict[str, list[str]] = {}
    for name, reason in unscored.items():
        reasons.setdefault(reason, []).append(name)
    rows = [(name, reason) for reason, names in reasons.items() for name in names]
    body = _folded(f"{len(unscored)} parameters", title, ("parameter", "why"), rows)
    return Section("unscored", title, body)


def _folded(
    summary: str, label: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> Markup:
    """A table of texts behind a line that opens it."""
    headings = [element("th", text, scope="col") for text in heads]
    lines = [
        element("tr", element("th", first, scope="row"), *(element("td", text) for text in rest))
        for first, *rest in rows
    ]
    table = element("table", element("thead", element("tr", *headings)), element("tbody", *lines))
    return element("details", element("summary", summary), _scrolling(table, label))


def _scrolling(inner: Markup, label: str) -> Markup:
    """A table that scrolls within its own region, which the keyboard reaches."""
    return element("div", inner, class_="scrolling", role="region", aria_label=label, tabindex=0)


def _no_script() -> Markup:
    text = "The pictures are drawn by a script in this file. The tables have the same numbers."
    return element("noscript", element("p", text))


def _aligned(kind: str) -> str | None:
    return None if kind == "text" else "number"
