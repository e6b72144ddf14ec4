"""Drawings of one small network: ``{picture} NAME`` puts one of them into a page, as inline SVG.

They take their colours from the page, so that they are read on light and on dark alike.  All
numbers in them are computed from :data:`WEIGHTS`, which has two inputs, two ReLU neurons and one
output; a bias is a weight whose input is the constant 1.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

__all__ = ["PICTURES", "WEIGHTS", "path_list", "setup", "share"]

Edge = tuple[str, str]
Path = tuple[str, ...]

#: Where each neuron is drawn; b1, b2 and c are the constants that biases are weights of.
PLACES: Mapping[str, tuple[float, float]] = {
    **{"x1": (50, 80), "x2": (50, 200), "h1": (240, 80), "h2": (240, 200), "y": (430, 140)},
    **{"b1": (240, 20), "b2": (240, 260), "c": (430, 80)},
}
NAMES = {"x1": "x₁", "x2": "x₂", "h1": "ReLU", "h2": "ReLU", "y": "y"}
WEIGHTS: Mapping[Edge, float] = {
    **{("x1", "h1"): 2, ("x2", "h1"): -1, ("b1", "h1"): 1},
    **{("x1", "h2"): 1, ("x2", "h2"): 3, ("b2", "h2"): -2},
    **{("h1", "y"): 3, ("h2", "y"): -1, ("c", "y"): 2},
}
#: The weight that the pictures prune.
PRUNED: Edge = ("x1", "h2")


# -- the mathematics -------------------------------------------------------------------------------


def path_list(weights: Mapping[Edge, float] = WEIGHTS) -> list[tuple[Path, float]]:
    """Every path from an input or a constant to the output, with the product of its weights."""

    def onward(path: Path, product: float) -> Iterator[tuple[Path, float]]:
        if path[-1] == "y":
            yield path, product
        for (start, end), weight in weights.items():
            if start == path[-1]:
                yield from onward((*path, end), product * weight)

    ends = {end for _, end in weights}
    starts = dict.fromkeys(start for start, _ in weights if start not in ends)
    return [each for start in starts for each in onward((start,), 1)]


def share(edge: Edge) -> float:
    """The part of the path-norm that runs through one weight."""
    total = sum(abs(product) for _, product in path_list())
    through = sum(
        abs(product) for path, product in path_list() if edge in zip(path, path[1:], strict=False)
    )
    return through / total


def value(weights: Mapping[Edge, float], x1: float, x2: float) -> float:
    """What the network computes."""
    known = {"x1": x1, "x2": x2, "b1": 1.0, "b2": 1.0, "c": 1.0}

    def into(neuron: str) -> float:
        return sum(w * known[start] for (start, end), w in weights.items() if end == neuron)

    for hidden in ("h1", "h2"):
        known[hidden] = max(0.0, into(hidden))
    return into("y")


# -- drawing ---------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{html.escape(text)}</text>'


def _line(
    edge: Edge, style: str = "edge", width: float | None = None, label: str = "", radius: float = 22
) -> str:
    """An edge between two neurons, from rim to rim, with a label on it."""
    (x, y), (u, v) = PLACES[edge[0]], PLACES[edge[1]]
    length = math.hypot(u - x, v - y)
    start, end = (9 if edge[0] in ("b1", "b2", "c") else radius) / length, 1 - radius / length
    thick = "" if width is None else f' style="stroke-width:{width:.1f}"'
    found = (
        f'<line x1="{x + start * (u - x):.1f}" y1="{y + start * (v - y):.1f}" '
        f'x2="{x + end * (u - x):.1f}" y2="{y + end * (v - y):.1f}" class="{style}"{thick}/>'
    )
    if not label:
        return found
    if x == u:
        return found + _text(x + 9, (y + v) / 2 + 2, label, "label right")
    at = 0.3 if edge in (("x1", "h2"), ("x2", "h1")) else 0.5
    return found + _text(x + at * (u - x), y + at * (v - y) + 5, label, "label")


def _neurons(names: Mapping[str, str] = NAMES) -> str:
    found = []
    for name, (x, y) in PLACES.items():
        if name in names:
            found.append(f'<circle cx="{x:g}" cy="{y:g}" r="22" class="neuron"/>')
            found.append(_text(x, y + 5, names[name], "name"))
        else:
            found.append(f'<rect x="{x - 8:g}" y="{y - 8:g}" width="16" height="16" class="one"/>')
            found.append(_text(x, y + 4, "1", "small"))
    return "".join(found)


def _svg(width: float, height: float, body: str, about: str) -> str:
    style = f"max-width:{width:g}px;min-width:{0.7 * width:g}px"
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(about)}" '
        f'xmlns="http://www.w3.org/2000/svg" style="{style}">{body}</svg>'
    )


def _labelled(labels: Mapping[Edge, str], marked: Sequence[Edge] = ()) -> str:
    # Labels come after all lines, so that none is crossed out.
    styles = {edge: "edge marked" if edge in marked else "edge" for edge in labels}
    return "".join(_line(edge, styles[edge]) for edge in labels) + "".join(
        _line(edge, "hidden", label=label) for edge, label in labels.items()
    )


def network() -> str:
    """The network with its weights."""
    labels = {edge: _number(weight) for edge, weight in WEIGHTS.items()}
    about = "A network of two inputs, two ReLU neurons and one output; " + ", ".join(
        f"{start} to {end}: {_number(weight)}" for (start, end), weight in WEIGHTS.items()
    )
    return _svg(480, 280, _labelled(labels) + _neurons(), about)


def paths() -> str:
    """Each path by itself, with its product."""
    found, scale, each = [], 0.34, path_list()
    for i, (path, product) in enumerate(each):
        steps = list(zip(path, path[1:], strict=False))
        body = "".join(_line(edge, "edge faint") for edge in WEIGHTS)
        body += "".join(_line(edge, "edge marked", 9) for edge in steps)
        body += "".join(
            f'<circle cx="{x}" cy="{y}" r="22" class="{"neuron on" if n in path else "neuron"}"/>'
            if n in NAMES
            else f'<rect x="{x - 10}" y="{y - 10}" width="20" height="20" class="one"/>'
            for n, (x, y) in PLACES.items()
        )
        x, y = i % 4 * 170, i // 4 * 150
        factors = [_number(WEIGHTS[edge]) for edge in steps]
        factors = [f"({f})" if f.startswith("−") and k else f for k, f in enumerate(factors)]
        said = (" · ".join(factors) + " = " if len(factors) > 1 else "") + _number(product)
        found.append(f'<g transform="translate({x} {y}) scale({scale})">{body}</g>')
        found.append(_text(x + 82, y + 112, said, "name"))
    about = "The paths of the network, each with the product of its weights: " + ", ".join(
        f"{' to '.join(path)}: {_number(product)}" for path, product in each
    )
    return _svg(680, 270, "".join(found), about)


def rescaled(neuron: str, factor: float) -> dict[Edge, float]:
    """Weights into a neuron times a factor, weights out of it divided by the same."""
    return {
        (start, end): w * (factor if end == neuron else 1) / (factor if start == neuron else 1)
        for (start, end), w in WEIGHTS.items()
    }


def rescaling() -> str:
    """The network in two scales."""
    other = rescaled("h2", 10)
    changed = [edge for edge in WEIGHTS if other[edge] != WEIGHTS[edge]]
    left, right = (
        _labelled({edge: _number(w) for edge, w in weights.items()}, changed) + _neurons()
        for weights in (WEIGHTS, other)
    )
    body = f'{left}<g transform="translate(490 0)">{right}</g>'
    body += _text(485, 146, "=", "large")
    about = (
        "The network beside the same with the weights into the lower ReLU times 10 and the weight "
        "out of it divided by 10"
    )
    return _svg(960, 280, body, about)


def lifted() -> str:
    """The forward pass that adds all paths up."""
    sizes = {edge: abs(weight) for edge, weight in WEIGHTS.items()}
    into: dict[str, float] = dict.fromkeys(("x1", "x2", "b1", "b2", "c"), 1)
    for neuron in ("h1", "h2", "y"):
        into[neuron] = sum(w * into[start] for (start, end), w in sizes.items() if end == neuron)
    names = {name: _number(into[name]) for name in NAMES}
    body = _labelled({edge: _number(weight) for edge, weight in sizes.items()}) + _neurons(names)
    about = (
        "The network with absolute weights, fed with ones: the hidden neurons hold "
        f"{names['h1']} and {names['h2']}, the output {names['y']}"
    )
    return _svg(480, 280, body, about)


def shares() -> str:
    """Lines as thick as the part of the path-norm that runs through them."""
    body = "".join(_line(edge, "edge share", 1 + 26 * share(edge)) for edge in WEIGHTS)
    body += "".join(_line(edge, "hidden", label=f"{100 * share(edge):.0f} %") for edge in WEIGHTS)
    about = "Part of the path-norm through each weight: " + ", ".join(
        f"{start} to {end}: {100 * share((start, end)):.0f} %" for start, end in WEIGHTS
    )
    return _svg(480, 280, body + _neurons(), about)


def bound() -> str:
    """The outputs of two networks along a line, with the band that the path-metric allows."""
    without = {edge: 0.0 if edge == PRUNED else weight for edge, weight in WEIGHTS.items()}
    apart = sum(abs(a - b) for (_, a), (_, b) in zip(path_list(), path_list(without), strict=True))
    steps = [i / 40 for i in range(-40, 41)]
    lines = [[value(weights, t, 0.8) for t in steps] for weights in (WEIGHTS, without)]
    top, bottom = max(lines[0]) + apart + 0.5, min(lines[0]) - apart - 0.5

    def at(t: float, y: float) -> str:
        return f"{60 + (t + 1) * 200:.1f},{20 + (top - y) / (top - bottom) * 220:.1f}"

    def run(values: Sequence[float]) -> str:
        return " ".join(at(t, y) for t, y in zip(steps, values, strict=True))

    upper, lower = ([y + d for y in lines[0]] for d in (apart, -apart))
    band = run(upper) + " " + " ".join(run(lower).split()[::-1])
    zero = at(-1, 0).split(",")[1]
    body = f'<polygon points="{band}" class="band"/>'
    body += f'<line x1="60" y1="{zero}" x2="460" y2="{zero}" class="edge faint"/>'
    body += f'<polyline points="{run(lines[0])}" class="curve first"/>'
    body += f'<polyline points="{run(lines[1])}" class="curve second"/>'
    x, y = (float(part) for part in at(1, lines[0][-1]).split(","))
    u, v = (float(part) for part in at(1, lines[1][-1]).split(","))
    body += _text(x + 8, y + 14, "before", "legend first")
    body += _text(u + 8, v, "after", "legend second")
    body += _text(60, 262, "x₁ = −1", "small") + _text(460, 262, "x₁ = 1", "small")
    body += _text(260, 262, "x₂ = 0.8", "small")
    about = (
        f"The output before and after the weight from {PRUNED[0]} to {PRUNED[1]} is set to zero, "
        f"along x2 = 0.8; the second line stays within {_number(apart)} of the first"
    )
    return _svg(540, 275, body, about)


PICTURES: Mapping[str, Callable[[], str]] = {
    each.__name__: each for each in (network, paths, rescaling, lifted, shares, bound)
}


class Picture(Directive):
    """One of the drawings, with its content as the caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """A figure."""
        name = self.arguments[0]
        if name not in PICTURES:
            raise self.error(f"{name!r} is no picture; there are {', '.join(PICTURES)}")
        figure = nodes.figure(classes=["picture"])
        figure += nodes.raw("", PICTURES[name](), format="html")
        if self.content:
            parsed, messages = self.state.inline_text("\n".join(self.content), self.lineno)
            figure += nodes.caption("", "", *parsed)
            return [figure, *messages]
        return [figure]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive and its style."""
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
