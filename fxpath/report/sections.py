"""The sections of the page, each from the part of the report that it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxpath.report.markup import Markup, element, join
from fxpath.report.modules import Module, nest, sums, walk

#: So many rows of the tree of modules are open at first.
_OPEN = 60
#: So many layers of a finding are named before the rest is folded away.
_NAMED = 8
#: Parts of the path-norm for which the curve is put into words.
_LOSSES = (0.01, 0.1)
_SHARE = (
    "Share of a layer: the part of all path mass that crosses it. Share of a module: the mean over "
    "its layers, which is the part of them that a path crosses on average, paths weighted by their "
    "mass. Effective: the number of entries that would carry the mass if all carried the same (exp "
    "of the entropy of the scores), as a part of the parameters."
)
_CURVE = (
    "Global pruning by Path-Mag: how much of the path-norm is lost at most when a part of the "
    "weights is set to zero, by the bound (13) of the paper, which needs the scores alone."
)


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
    makers = (_findings, _modules, _layers, _pruning, _table, _unscored)
    return [section for section in (make(report) for make in makers) if section is not None]


def pairs(of: Sequence[Sequence[str]], class_: str) -> Markup:
    """Names with what they stand for, as a list."""
    items = [element("div", element("dt", name), element("dd", text)) for name, text in of]
    return element("dl", *items, class_=class_)


def _findings(report: Mapping[str, Any]) -> Section:
    index = {row["layer"]: i for i, row in enumerate(report["rows"])}
    items = [
        element(
            "li",
            element("h3", finding["kind"].replace("_", " ").capitalize()),
            element("p", finding["text"]),
            _named(finding["layers"], index),
        )
        for finding in report["findings"]
    ]
    none = element("p", "Nothing stands out.", class_="about")
    found = element("ul", *items, class_="findings") if items else none
    return Section("findings", "What the numbers say", found)


def _named(layers: Sequence[str], index: Mapping[str, int]) -> Markup:
    """Links to layers, the first few of them open."""
    links = [_link(name, index[name]) if name in index else name for name in layers]
    first = [element("li", link) for link in links[:_NAMED]]
    rest = [element("li", link) for link in links[_NAMED:]]
    if not first:
        return Markup()
    more = element(
        "details",
        element("summary", f"and {len(rest)} more"),
        element("ul", *rest, class_="names"),
    )
    return join(element("ul", *first, class_="names"), more if rest else "")


def _link(text: str, index: int) -> Markup:
    """A link that chooses a layer and goes to what is said of it."""
    return element("a", text or "(model)", href="#layer", data_row=index)


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
        element("span", "effective"),
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
        element("p", _SHARE, class_="about"),
        buttons if any(module.parts for module in tree) else "",
        element("div", heading, _branch(tree, rows, level), class_="tree"),
    )
    return Section("modules", "Modules", body)


def _branch(
    parts: Sequence[Module], rows: Sequence[Mapping[str, Any]], level: int, depth: int = 1
) -> Markup:
    items = []
    for part in parts:
        inside = [rows[i] for i in part.layers]
        if part.parts:
            name = element("span", part.name, " ", element("small", f"{len(inside)} layers"))
            line = element("summary", name, *_measures(inside), class_="tree-row")
            inner = _branch(part.parts, rows, level, depth + 1)
            items.append(element("details", line, inner, open=depth < level))
        else:
            operation = element("small", inside[0]["operation"])
            name = element("span", _link(part.name, part.layers[0]), " ", operation)
            items.append(element("div", name, *_measures(inside), class_="tree-row leaf"))
    return element("ul", *(element("li", item) for item in items))


def _measures(rows: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    found = sums(rows)
    yield element(
        "span", _number(found["parameters"], "count"), _aside(" parameters"), class_="number"
    )
    for name, said in (("share", "share"), ("effective_part", "effective")):
        width = f"{100 * min(1.0, found[name]):.4g}%"
        bar = element("rect", width=width, height="100%", class_=name)
        yield element(
            "span",
            element("svg", bar, class_="bar", aria_hidden="true"),
            element("span", _aside(f"{said} "), _number(found[name], "part"), class_="number"),
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
        element("button", "Previous", type="button", id="previous"),
        element("button", "Next", type="button", id="next"),
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
    curve = report["curve"]
    if not curve:
        return None
    found = []
    for loss in _LOSSES:
        within = [pruned for pruned, bound in curve if bound <= loss]
        if within:
            found.append(
                f"At {_number(max(within), 'part')} of the weights the loss is at most {loss:.0%} "
                "of the path-norm."
            )
    rows = [
        element(
            "tr",
            element("th", _number(pruned, "part"), scope="row", class_="number"),
            element("td", _bound(bound), class_="number"),
        )
        for pruned, bound in curve
    ]
    headings = [
        element("th", text, scope="col", class_="number")
        for text in ("weights pruned", "path-norm lost, at most")
    ]
    values = element("table", element("thead", element("tr", *headings)), element("tbody", *rows))
    axis = element(
        "label", element("input", type="checkbox", id="logarithmic"), " Logarithmic axis"
    )
    body = join(
        element("p", _CURVE, class_="about"),
        element("p", " ".join(found)) if found else "",
        _no_script(),
        element(
            "div",
            element("p", axis, class_="controls"),
            element("div", id="curve", class_="chart"),
            class_="scripted",
        ),
        element(
            "details", element("summary", "The curve as a table"), _scrolling(values, "The curve")
        ),
    )
    return Section("pruning", "Sparsity against certificate", body)


def _bound(bound: float) -> str:
    return _number(bound, "part") if bound >= 0.001 else f"{100 * bound:.1e} %"


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
        pairs([(c["heading"], c["about"]) for c in columns], class_="meanings"),
    )
    body = join(controls, _scrolling(table, "Table of layers"), meanings)
    return Section("table", "Table", body)


def _cells(
    row: Mapping[str, Any], columns: Sequence[Mapping[str, str]], index: int
) -> Iterator[Markup]:
    for place, column in enumerate(columns):
        text = _number(row[column["name"]], column["kind"])
        if place:
            yield element("td", text, class_=_aligned(column["kind"]))
        else:
            yield element("th", _link(text, index), scope="row")


def _unscored(report: Mapping[str, Any]) -> Section | None:
    unscored = report["unscored"]
    if not unscored:
        return None
    reasons: dict[str, list[str]] = {}
    for name, reason in unscored.items():
        reasons.setdefault(reason, []).append(name)
    lines = [
        element("tr", element("th", name, scope="row"), element("td", reason))
        for reason, names in reasons.items()
        for name in names
    ]
    headings = [element("th", text, scope="col") for text in ("parameter", "why")]
    table = element("table", element("thead", element("tr", *headings)), element("tbody", *lines))
    body = element(
        "details",
        element("summary", f"{len(unscored)} parameters"),
        _scrolling(table, "Parameters without a score"),
    )
    return Section("unscored", "Parameters without a score", body)


def _scrolling(inner: Markup, label: str) -> Markup:
    """A table that scrolls within its own region, which the keyboard reaches."""
    return element("div", inner, class_="scrolling", role="region", aria_label=label, tabindex=0)


def _no_script() -> Markup:
    text = "The pictures are drawn by a script in this file. The tables have the same numbers."
    return element("noscript", element("p", text))


def _aligned(kind: str) -> str | None:
    return None if kind == "text" else "number"


def _number(value: Any, kind: str) -> str:
    """A value of a column as text, at most three digits of what is not counted."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    match kind:
        case "text":
            return str(value)
        case "count":
            return f"{value:,}"
        case "part":
            return f"{100 * value:.1f} %"
        case "log":
            return f"{value:.1e}" if value else "0"
        case _:
            return f"{value:,.0f}" if 1000 <= value < 1e15 else f"{value:.3g}"
