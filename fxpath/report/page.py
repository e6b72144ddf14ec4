"""An analysis as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fxpath.report.markup import Markup, element
from fxpath.report.plain import finite
from fxpath.report.sections import capped, pairs, sections


def page(report: Mapping[str, Any]) -> str:
    """A self-contained HTML document of the plain data of an analysis.

    It loads nothing: style, scripts and data are inside, a content security policy allows these
    and nothing else, and text from the report (names of modules can be anything) is never markup.

    Args:
        report: ``title``, ``summary``, ``findings``, ``columns``, ``rows``, ``histograms``,
            ``weights``, ``curve``, ``unscored``, ``norm``, ``gates`` and ``about_gates``, as
            ``Analysis.report()`` returns them.

    Returns:
        The text of the file, to be written in UTF-8.

    Example:
        >>> import fxpath, torch
        >>> text = page(fxpath.analyze(torch.nn.Linear(2, 1)).report())
        >>> text.startswith("<!doctype html>"), "src=" in text
        (True, False)
    """
    style = element("style", Markup(_asset("page.css")))
    scripts = [element("script", Markup(_asset(name))) for name in ("charts.js", "page.js")]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, *scripts)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # Without an icon of its own, a browser asks the server for one.
        element("link", rel="icon", href="data:,"),
        element("title", report["title"]),
        style,
    )
    parts = sections(report)
    links = [element("a", part.title, href=f"#{part.name}") for part in parts]
    shown = [
        element(
            "section",
            element("h2", part.title, id=f"{part.name}-heading"),
            part.body,
            id=part.name,
            aria_labelledby=f"{part.name}-heading",
        )
        for part in parts
    ]
    body = element(
        "body",
        element("a", "Skip to the findings", href="#main", class_="skip"),
        element(
            "header", element("h1", report["title"]), pairs(report["summary"], class_="summary")
        ),
        element("nav", *links, aria_label="Sections"),
        element("main", *shown, id="main", tabindex=-1),
        element("script", _data(report), type="application/json", id="data"),
        *scripts,
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _data(report: Mapping[str, Any]) -> Markup:
    """What the scripts draw, as JSON that no text in it can end or turn into markup."""
    names = [column["name"] for column in report["columns"]]
    data = {
        "columns": report["columns"],
        "rows": [[row[name] for name in names] for row in report["rows"]],
        "histograms": [_drawn(report["histograms"][row["layer"]]) for row in report["rows"]],
        "curve": capped(report["curve"]),
        "norm": report["norm"],
    }
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _drawn(histogram: Mapping[str, Any]) -> dict[str, Any]:
    """A histogram with its edges as fine as a picture can show them."""
    return {**histogram, "edges": [round(edge, 3) for edge in histogram["edges"]]}


def _policy(style: Markup, *scripts: Markup) -> str:
    """Nothing but this very style and these very scripts, and no address at all."""
    allowed = " ".join(map(_digest, scripts))
    return (
        f"default-src 'none'; style-src {_digest(style)}; script-src {allowed}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(inline: Markup) -> str:
    content = inline[inline.index(">") + 1 : inline.rindex("<")]
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("fxpath.report").joinpath(name).read_text(encoding="utf-8")
