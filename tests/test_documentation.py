"""The documentation: its examples run, its commands parse, and it leaves out nothing public.

That its pages refer to each other rightly is Sphinx's to say, whose warnings are errors in .ci/run.
"""

import re
import shlex
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from fxpath.graph.squashes import SQUASHES, squash_of
from fxpath.rules import GATED, RULES
from fxpath.rules.refused import EXPLAINED
from fxpath_command.parser import parse
from tests.support.pages import ROOT, blocks, run

pytest.importorskip("docutils")
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))
from extension import operations, pictures  # noqa: E402

PAGES = sorted(DOCS.rglob("*.md"))
RUNNING = [page for page in PAGES if blocks(page, "python")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


#: Libraries that a page shows.
SHOWN = {
    "coming_from/torch_pruning.md": ["torch_pruning"],
    "how_to/in_training.md": ["lightning", "transformers", "accelerate"],
}


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    for library in SHOWN.get(name(page), []):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    run(page)


def test_code_of_other_packages_is_python_too() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page, "py")]
    assert len(found) >= 3
    for page, block in found:
        compile(block, name(page), "exec")


# -- commands --------------------------------------------------------------------------------------

COMMANDS = [
    (name(page), line.partition("run: ")[2] or line)
    for page in PAGES
    for language in ("sh", "yaml")
    for block in blocks(page, language)
    for line in block.splitlines()
    if language == "sh" or "run: " in line
]


@pytest.mark.parametrize("page, line", COMMANDS)
def test_command_parses(page: str, line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "fxpath":
        parse(arguments)
    elif program == "python":
        assert arguments[0] == "-m"
        source = ROOT.joinpath(*arguments[1].split(".")).with_suffix(".py").read_text()
        options = source + (ROOT / "benchmarks" / "timing.py").read_text()
        for option in re.findall(r"--[a-z-]+", line):
            assert f'"{option}"' in options
    else:
        assert line.startswith("pip install "), line


# -- the reference ---------------------------------------------------------------------------------


def test_reference_has_every_public_name_once() -> None:
    reference = "\n".join(text for page, text in TEXTS.items() if page.parent.name == "reference")
    named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", reference, re.M)
    named += re.findall(r"^\.\. automodule:: fxpath\.(\w+)$", reference, re.M)
    public = set(fxpath.__all__) - {"__version__"}
    assert sorted(named) == sorted(public | {"toolchain"})
    listed = re.findall(r"^   (\w+)$", reference, re.M)
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == public - {"criteria", "passes"}


def test_operations_have_every_rule_once() -> None:
    shown = re.findall(r"^```\{operations\} (\w+)$", TEXTS[DOCS / "operations.md"], re.M)
    overloads = [each for module in shown for row in operations.supported(module) for each in row]
    assert sorted(overloads) == sorted(map(str, RULES))


def test_operations_have_every_rule_for_gates_once() -> None:
    assert "```{gated}\n" in TEXTS[DOCS / "operations.md"]
    overloads = [each for row in operations.gated() for each in row]
    assert sorted(overloads) == sorted(map(str, GATED))


def test_activations_have_the_numbers_that_count() -> None:
    assert "```{gates}\n" in TEXTS[DOCS / "operations.md"]
    shown = {name: (size, lipschitz) for name, size, lipschitz, *_ in operations.activations()}
    assert list(shown) == list(SQUASHES)
    assert shown["silu"] == ("1", "1.09984") and shown["sigmoid"] == ("none", "0.25")
    selu = squash_of("selu")
    assert selu is not None and shown["selu"] == (f"{selu.size:.6g}", f"{selu.lipschitz:.6g}")


def test_operations_that_are_refused_have_no_rule() -> None:
    refused = {word for words, _, _ in operations.refusals() for word in words}
    assert refused < set(EXPLAINED)
    assert {"softmax", "gelu", "layer_norm", "pow"} < refused  # pow(x, y) of two activations
    # Every form of these has a rule, so that what is said of refusing them never is.
    for word in set(EXPLAINED) - refused:
        packet = getattr(torch.ops.aten, word)
        assert any(str(overload).startswith(f"{packet}.") for overload in RULES), word


# -- pictures --------------------------------------------------------------------------------------


def drawn_network() -> nn.Module:
    """The network that the pictures are of."""
    w = pictures.WEIGHTS
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    state = {
        "0.weight": [[w[x, h] for x in ("x1", "x2")] for h in ("h1", "h2")],
        "0.bias": [w["b1", "h1"], w["b2", "h2"]],
        "2.weight": [[w["h1", "y"], w["h2", "y"]]],
        "2.bias": [w["c", "y"]],
    }
    model.load_state_dict({key: torch.tensor(value).float() for key, value in state.items()})
    return model


def test_pictures_have_the_numbers_of_their_network() -> None:
    model = drawn_network()
    lifting = fxpath.path_lifting(model, x=torch.tensor([0.3, -0.8]))
    assert sorted(product for _, product in pictures.path_list()) == sorted(lifting.phi.tolist())
    value = pictures.value(pictures.WEIGHTS, 0.3, -0.8)
    assert value == pytest.approx(lifting.realization().item())
    scores = fxpath.analyze(model).scores
    for i, x in enumerate(("x1", "x2")):
        for j, h in enumerate(("h1", "h2")):
            assert pictures.share((x, h)) == pytest.approx(scores["0.weight"][j, i].item())
    assert pictures.share(("h2", "y")) == pytest.approx(scores["2.weight"][0, 1].item())
    assert pictures.share(("c", "y")) == pytest.approx(scores["2.bias"].item())
    assert pictures.rescaled("h2", 10)["h2", "y"] == pytest.approx(-0.1)


@pytest.mark.parametrize("picture", pictures.PICTURES)
def test_picture_is_drawn_and_used(picture: str) -> None:
    root = xml.etree.ElementTree.fromstring(pictures.PICTURES[picture]())
    assert root.attrib["role"] == "img" and len(root.attrib["aria-label"]) > 40
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height
    assert any(f"{{picture}} {picture}\n" in text for text in TEXTS.values())
