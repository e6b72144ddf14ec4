"""The report as a page: what is in the file, read without a browser."""

import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from fxpath.report.modules import Module, nest, sums, walk
from fxpath.report.page import page
from tests.support.reports import made_up

NAMES = ["stem", "blocks.0.conv", "blocks.0.skip.0", "blocks.1.conv", "head.fc"]
HOSTILE = [
    "</script><img src=x onerror=hit()>",
    '" autofocus onfocus="hit()',
    "<!--<script>",
    "&lt;",
]
VOID = {"meta", "link", "input", "wbr"}


class Reader(HTMLParser):
    """Elements of a page in order, with their attributes and the text directly in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            tag, attributes, text = self.elements[self.open[-1]]
            self.elements[self.open[-1]] = (tag, attributes, text + data)

    def all(self, *tags: str) -> Iterator[tuple[str, dict[str, str | None], str]]:
        return (element for element in self.elements if element[0] in tags)


def test_the_page_is_well_formed_and_its_links_lead_somewhere() -> None:
    reader = Reader(page(made_up(NAMES)))
    ids = [a["id"] for _, a, _ in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for _, a, _ in reader.all("a")}
    assert targets and all(target and target[1:] in ids for target in targets)
    levels = [int(tag[1]) for tag, _, _ in reader.all("h1", "h2", "h3")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))
    assert {"header", "nav", "main"} <= {tag for tag, _, _ in reader.elements}


def test_nothing_in_the_file_is_an_address() -> None:
    reader = Reader(page(made_up(NAMES)))
    addresses = [a[k] for _, a, _ in reader.elements for k in ("src", "href", "srcset") if k in a]
    assert {address[:5] for address in addresses if address and address[0] != "#"} == {"data:"}
    inside = "".join(text for _, _, text in reader.all("style", "script"))
    # The name of SVG's namespace is no address that anything is loaded from.
    assert re.findall(r"https?:[^\"]*|url\(|@import", inside) == ["http://www.w3.org/2000/svg"]


def test_names_are_text_wherever_they_stand() -> None:
    report = made_up(HOSTILE, title=HOSTILE[0])
    report["findings"][0].update(text=HOSTILE[0], kind=HOSTILE[2])
    report["summary"] = [HOSTILE[:2]]
    report["unscored"] = {HOSTILE[0]: HOSTILE[1]}
    report.update(norm=HOSTILE[0], about_gates=HOSTILE[1])
    report["gates"][0].update(module_path=HOSTILE[0], source_line=HOSTILE[1], factor=HOSTILE[2])
    report["columns"][1].update(heading=HOSTILE[0], about=HOSTILE[1])
    plain, hostile = Reader(page(made_up(["a", "b", "c", "d"]))), Reader(page(report))
    assert {tag for tag, _, _ in hostile.elements} == {tag for tag, _, _ in plain.elements}
    attributes = {name for _, a, _ in plain.elements for name in a}
    assert {name for _, a, _ in hostile.elements for name in a} <= attributes
    assert len(list(hostile.all("script"))) == 3
    data = json.loads(next(text for _, a, text in hostile.all("script") if a.get("id") == "data"))
    assert [row[0] for row in data["rows"]] == HOSTILE
    assert [text for tag, _, text in hostile.all("h1")] == HOSTILE[:1]


def test_an_empty_network_has_a_page() -> None:
    report = {**made_up([]), "findings": [], "curve": [], "unscored": {}, "gates": []}
    sections = [a["id"] for _, a, _ in Reader(page(report)).all("section")]
    assert sections == ["findings"]


def test_numbers_that_are_not_finite_are_no_numbers_in_the_data() -> None:
    report = made_up(NAMES)
    report["rows"][0].update(p10=math.nan, effective=math.inf)
    reader = Reader(page(report))
    text = next(text for _, a, text in reader.all("script") if a.get("id") == "data")
    row = json.loads(text, parse_constant=pytest.fail)["rows"][0]
    assert row[6] is None and row[9] is None


def test_modules_hold_every_layer_once_and_in_order() -> None:
    chance = random.Random(0)
    for _ in range(50):
        names = list(
            dict.fromkeys(
                ".".join(chance.choices("abc", k=chance.randrange(1, 5))) for _ in range(20)
            )
        )
        leaves = [m for _, m in walk(nest(names)) if not m.parts]
        assert sorted(i for m in leaves for i in m.layers) == list(range(len(names)))
        for _, module in walk(nest(names)):
            if module.parts:
                assert module.layers == tuple(sorted(i for p in module.parts for i in p.layers))
                assert len(module.parts) > 1
        assert {".".join(path): i for path, i in full_names(nest(names))} == {
            name: i for i, name in enumerate(names)
        }


def full_names(parts: tuple[Module, ...]) -> Iterator[tuple[list[str], int]]:
    for part in parts:
        if not part.parts:
            yield [part.name], part.layers[0]
        for path, index in full_names(part.parts):
            yield [part.name, *path], index


def test_a_crowd_of_layers_is_shown_in_runs() -> None:
    tree = nest([str(2 * i) for i in range(400)])
    assert len(tree) == 20
    assert (tree[1].name, tree[1].layers) == ("40 … 78", tuple(range(20, 40)))


def test_numbers_of_a_module_are_those_of_its_weights_together() -> None:
    scores = [torch.rand(n, dtype=torch.float64) ** 3 / n for n in (5, 40, 300)]
    scores += [torch.zeros(7, dtype=torch.float64)]

    def effective(of: torch.Tensor) -> float:
        parts = of / of.sum()
        return float(torch.exp(-(parts * parts.clamp_min(1e-300).log()).sum())) if of.any() else 0.0

    rows = [
        {"share": float(s.sum()) + 0.01, "parameters": len(s) + 1, "effective": effective(s)}
        for s in scores
    ]
    found = sums(rows, [(len(s), float(s.sum())) for s in scores])
    assert found["parameters"] == 356
    assert found["share"] == pytest.approx(sum(float(s.sum()) + 0.01 for s in scores) / 4)
    assert found["effective_part"] == pytest.approx(effective(torch.cat(scores)) / 352)
    assert sums(rows[3:], [(7, 0.0)])["effective_part"] == 0.0


def test_a_real_report_has_a_page_with_its_numbers() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2))
    analysis = fxpath.analyze(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), inner))
    report = analysis.report()
    outer = analysis.table(depth=1).rows
    for module, row in zip(nest([r["layer"] for r in report["rows"]]), outer, strict=True):
        inside = [report["rows"][i] for i in module.layers]
        found = sums(inside, [report["weights"][r["layer"]] for r in inside])
        assert found["effective_part"] == pytest.approx(row["effective_part"])
        assert found["share"] * len(inside) == pytest.approx(row["share"])
    reader = Reader(page(report))
    cells = [text for _, _, text in reader.all("td")]
    for row in report["rows"]:
        assert f"{row['share']:.1%}" in cells and f"{row['parameters']:,}" in cells
    assert "slope" in cells


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(theme: str) -> None:
    css = files("fxpath.report").joinpath("page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    colors = dict(re.findall(r"--(\w+): (#\w+)", blocks[0] if theme == "light" else blocks[1]))
    for ground in ("ground", "card", "stripe", "track"):
        for text in ("text", "soft", "link"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    # Shapes that carry a meaning: WCAG 1.4.11.
    for shape in ("data", "second", "now"):
        assert contrast(colors[shape], colors["card"]) >= 3, shape


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2."""

    def luminance(color: str) -> float:
        parts: list[Any] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
