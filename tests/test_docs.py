"""The README's examples run, and every public name says what it takes and what it raises."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import FunctionType

import pytest

import fxpath
from tests.support.pages import ROOT, blocks, run

README = ROOT / "README.md"


def public_functions() -> list[tuple[str, FunctionType]]:
    """The functions in `fxpath.__all__`, and the public methods of the classes in it."""
    found: list[tuple[str, FunctionType]] = []
    for name in fxpath.__all__:
        value = getattr(fxpath, name)
        if inspect.isfunction(value):
            found.append((name, value))
        elif inspect.isclass(value):
            for attribute, member in vars(value).items():
                function = member.fget if isinstance(member, property) else member
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    found.append((f"{name}.{attribute}", function))
    return found


def raises(function: FunctionType) -> bool:
    """Whether the function itself has a raise statement with an exception of its own."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def test_readme_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    run(README)


def test_readme_starts_with_the_two_commands() -> None:
    first, second = blocks(README, "sh")[:2]
    assert "fxpath analyze alexnet vgg16 resnet18" in first
    assert second.strip() == ".venv/bin/python -m pytest"


@pytest.mark.parametrize("name", sorted(n for n in fxpath.__all__ if not n.startswith("__")))
def test_public_name_has_a_docstring(name: str) -> None:
    value = getattr(fxpath, name)
    if inspect.ismodule(value) or callable(value):
        assert inspect.getdoc(value), f"fxpath.{name} has no docstring"


@pytest.mark.parametrize(
    "name, function", [pytest.param(n, f, id=n) for n, f in public_functions()]
)
def test_public_function_documents_arguments_and_errors(name: str, function: FunctionType) -> None:
    text = inspect.getdoc(function) or ""
    assert text, f"{name} has no docstring"
    # One-liners take what analyze takes, and say so instead of repeating it.
    deferred = re.search(r"(as for|those of) :func:`analyze`", text) is not None
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    if parameters and not deferred:
        assert "Args:" in text, f"{name} does not document its arguments"
        for parameter in parameters:
            assert re.search(rf"^\s+\*{{0,2}}`*{parameter}\b", text, re.M), f"{name}: {parameter}?"
    if raises(function):
        assert "Raises:" in text, f"{name} does not say what it raises"
