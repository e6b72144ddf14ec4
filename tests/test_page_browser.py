"""The report as a page, in headless Chromium: what people do with it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxpath.report.page import page
from tests.support.reports import made_up

webdriver = pytest.importorskip("selenium.webdriver")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
for program in ("chromium", "chromedriver"):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed", allow_module_level=True)

HOSTILE = "</script><img src=x onerror=hit()>"
NAMES = [
    "stem.conv",
    *(f"stage{i}.{j}.{part}" for i in (1, 2) for j in (0, 1) for part in ("conv1", "conv2")),
    f"odd.{HOSTILE}",
    "odd.__proto__",
    "head",
]
REPORT = made_up(NAMES, title=f"A network with {HOSTILE}")
# The last layer is dead: all of its scores are 0.
REPORT["rows"][-1].update(
    dict.fromkeys(("share", "effective", "effective_part", "per_parameter", "p50", "p90"), 0.0)
)
REPORT["histograms"]["head"] = {"edges": [], "counts": [], "zeros": 99}
REPORT["weights"]["head"] = [99, 0.0]
SHARES = [row["share"] for row in REPORT["rows"]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(REPORT), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """The page as it is at first; whatever a test does, nothing is complained of or loaded."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    resize(browser, 1280)
    prefer(browser)
    browser.get(address)
    settle(browser)
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert {url.split(",")[0] for url in requested(browser)} <= {address, "data:"}
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def requested(browser: Any) -> list[str]:
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"].split("#")[0] for params in sent]


def resize(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(browser: Any, scheme: str = "light") -> None:
    """What the visitor's system asks for; without motion, so that places are final at once."""
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def settle(browser: Any) -> None:
    """Two frames, after which what is resized is drawn."""
    browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done));"
    )


def by_id(browser: Any, name: str) -> Any:
    return browser.find_element("id", name)


def column(browser: Any, number: int) -> list[str]:
    """The cells of a column that are shown, from the top."""
    return list(
        browser.execute_script(
            "return [...document.getElementById('rows').tBodies[0].rows]"
            ".filter((row) => row.checkVisibility())"
            ".map((row) => row.cells[arguments[0]].textContent)",
            number,
        )
    )


def heading(browser: Any, name: str) -> Any:
    names = [c["name"] for c in REPORT["columns"]]
    place = names.index(name) + 1
    return browser.find_element("css selector", f"#rows thead th:nth-child({place})")


def test_opening_it_loads_nothing_and_runs_nothing_from_names(opened: Any) -> None:
    assert requested(opened), "the log shows what is loaded"
    assert opened.title == REPORT["title"]
    assert opened.find_elements("css selector", "img, [onerror]") == []
    assert column(opened, 0) == NAMES


@pytest.mark.parametrize(
    ("directive", "mistake"),
    [
        ("img-src", "Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' })"),
        ("script-src-attr", "document.createRange().createContextualFragment('<b onclick=1>')"),
    ],
)
def test_the_policy_holds_where_a_mistake_lets_markup_in(
    browser: Any, address: str, directive: str, mistake: str
) -> None:
    browser.get(address)
    blocked = browser.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        f"document.body.append({mistake});"
    )
    assert blocked == directive


def test_columns_sort_by_number_by_text_and_back(opened: Any) -> None:
    share = heading(opened, "share")
    falling = sorted(range(len(NAMES)), key=lambda i: -SHARES[i])
    for state, order in (
        ("descending", falling),
        ("ascending", sorted(range(len(NAMES)), key=lambda i: SHARES[i])),
        ("none", list(range(len(NAMES)))),
    ):
        share.find_element("tag name", "button").click()
        assert share.get_attribute("aria-sort") == state
        assert column(opened, 0) == [NAMES[i] for i in order]
    shape = heading(opened, "shape")
    shape.find_element("tag name", "button").click()
    assert shape.get_attribute("aria-sort") == "ascending"
    assert column(opened, 2)[:3] == ["8x0x3x3", "8x1x3x3", "8x2x3x3"], "numbers in text as numbers"
    assert "sorted by shape, ascending" in by_id(opened, "count").text
    share.find_element("tag name", "button").click()
    assert shape.get_attribute("aria-sort") == "none"


def test_rows_are_filtered_by_words_and_counted(opened: Any) -> None:
    field, count = by_id(opened, "filter"), by_id(opened, "count")
    assert field.accessible_name == "Filter"
    field.send_keys("STAGE1  .conv2")
    assert column(opened, 0) == ["stage1.0.conv2", "stage1.1.conv2"]
    assert count.text == f"2 of {len(NAMES)} layers"
    assert count.get_attribute("role") == "status"
    heading(opened, "share").find_element("tag name", "button").click()
    assert len(column(opened, 0)) == 2
    field.send_keys(" no such")
    assert column(opened, 0) == [] and count.text.startswith("0 of")


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    opened.switch_to.active_element.send_keys(Keys.TAB)
    skip = opened.switch_to.active_element
    assert skip.text == "Skip to the findings" and skip.rect["x"] >= 0
    skip.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.get_attribute("id") == "main"
    button = heading(opened, "parameters").find_element("tag name", "button")
    button.send_keys(Keys.ENTER)
    assert heading(opened, "parameters").get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.SPACE)
    assert heading(opened, "parameters").get_attribute("aria-sort") == "ascending"
    assert (
        opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        == "solid"
    ), "the focus is seen"
    part = opened.find_element("css selector", ".tree details")
    was = part.get_attribute("open")
    part.find_element("tag name", "summary").send_keys(Keys.ENTER)
    assert part.get_attribute("open") != was
    by_id(opened, "next").send_keys(Keys.ENTER)
    assert by_id(opened, "layer-name").text == NAMES[1]
    by_id(opened, "choose-layer").send_keys(Keys.ARROW_DOWN)
    assert by_id(opened, "layer-name").text == NAMES[2]
    slider = by_id(opened, "pruned")
    slider.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert by_id(opened, "lost").text.startswith("0.50%: at most ")
    assert slider.get_attribute("aria-valuetext") == by_id(opened, "lost").text


def test_every_control_has_a_name(opened: Any) -> None:
    for part in opened.find_elements("css selector", "details"):
        opened.execute_script("arguments[0].open = true", part)
    controls = opened.find_elements(
        "css selector", "button, select, input, nav, [role=region], svg[role=img], section"
    )
    assert len(controls) > 25
    assert [c.get_attribute("outerHTML")[:99] for c in controls if not c.accessible_name] == []


def test_a_name_leads_to_its_layer(opened: Any) -> None:
    name = NAMES[-3]
    opened.find_element("css selector", f".tree a[data-row='{len(NAMES) - 3}']").click()
    assert by_id(opened, "layer-name").text == name
    assert by_id(opened, "choose-layer").get_attribute("value") == str(len(NAMES) - 3)
    current = opened.find_element("css selector", "#rows [aria-current=true] th")
    assert current.get_property("textContent") == name
    assert opened.execute_script("return document.activeElement.id") == "layer"


def bars(browser: Any, chart: str) -> list[float]:
    """Heights of what is drawn in a chart."""
    return list(
        browser.execute_script(
            "return [...document.querySelectorAll(`#${arguments[0]} rect.data`)]"
            ".map((bar) => Number(bar.getAttribute('height')))",
            chart,
        )
    )


def test_pictures_show_the_numbers(opened: Any) -> None:
    by_id(opened, "choose-quantity").send_keys("share")
    heights = bars(opened, "quantity")
    scale = heights[0] / SHARES[0]
    assert heights == pytest.approx([scale * share for share in SHARES], rel=1e-6)
    counts = REPORT["histograms"][NAMES[0]]["counts"]
    heights = bars(opened, "histogram")
    assert heights == pytest.approx([c * max(heights) / max(counts) for c in counts], abs=1e-6)
    assert opened.find_elements("css selector", "#histogram .zeros") == []
    by_id(opened, "next").click()
    assert len(opened.find_elements("css selector", "#histogram .zeros")) == 1
    by_id(opened, "choose-layer").send_keys(Keys.END)
    assert by_id(opened, "layer-name").text == "head"
    assert len(opened.find_elements("css selector", "#histogram .zeros")) == 1
    assert bars(opened, "histogram") == []
    for option in opened.find_elements("css selector", "#choose-quantity option"):
        option.click()
        drawn = opened.find_elements("css selector", "#quantity rect.data, #quantity circle.data")
        assert len(drawn) == len(NAMES), option.text


def test_the_curve_has_two_axes(opened: Any) -> None:
    def heights() -> list[float]:
        text = opened.find_element("css selector", "#curve polyline").get_attribute("points")
        return [-float(place.split(",")[1]) for place in text.split()]

    box = by_id(opened, "logarithmic")
    assert box.is_selected(), "over so many powers of ten nothing else shows anything"
    log = heights()
    steps = [after - before for before, after in zip(log[26:], log[27:175], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps)), "the data is a power: a straight line"
    assert steps[0] > 0 and log[0] == log[1] == min(log), "what is below the axis lies on it"
    assert log[-1] == log[180], "more than all cannot be lost"
    box.click()
    linear = heights()
    part = (linear[150] - linear[0]) / (linear[-1] - linear[0])
    assert part == pytest.approx(REPORT["curve"][150][1])


def test_nothing_is_wider_than_a_telephone(opened: Any) -> None:
    resize(opened, 400)
    settle(opened)
    by_id(opened, "open-all").click()
    page_width, seen = opened.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert page_width == seen <= 400
    inner, outer = opened.execute_script(
        "const box = document.querySelector('#table .scrolling');"
        "return [box.scrollWidth, box.clientWidth]"
    )
    assert inner > outer, "the table scrolls within its own region"
    assert opened.find_element("css selector", "#quantity svg").size["width"] < 400


def test_both_themes_show(opened: Any) -> None:
    def ground() -> Any:
        return opened.execute_script("return getComputedStyle(document.body).backgroundColor")

    assert ground() == "rgb(245, 246, 248)"
    prefer(opened, "dark")
    assert ground() == "rgb(15, 19, 24)"


def test_four_hundred_layers_open_at_once(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.html"
    path.write_text(page(made_up([f"block{i // 8}.{i}.conv" for i in range(400)])))
    assert path.stat().st_size < 3e6
    browser.get(path.as_uri())
    spent = browser.execute_script(
        "const t = performance.timing; return t.loadEventEnd - t.navigationStart"
    )
    # A second on an idle machine; the others that test at the same time are given some room.
    assert 0 < spent < 4000
    assert len(column(browser, 0)) == 400
