"""Private names of torch are read in one module, fxpath.private."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxpath

PACKAGE = Path(fxpath.__file__).parent
#: The dictionaries that a module's parts are in; torch's own users write modules with them.
PARTS = {"_modules", "_parameters", "_buffers"}
#: What Python's own named tuples are read by.
TUPLES = {"_fields"}
#: Whose names with an underscore are not torch's, or are names of operators in a graph.
ELSEWHERE = {"self", "cls", "super()", "aten", "functools"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PARTS | TUPLES


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that the package itself defines."""
    own = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)  # of a class
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
    return own


def private(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Where a module reads a private name of torch."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ELSEWHERE:
            names = [] if node.attr in own else [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant)]
        yield from (f"line {node.lineno}: {name}" for name in names if is_private(name))


def test_private_names_of_torch_are_read_in_one_module() -> None:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("fxpath_*.py")]
    trees = {path: ast.parse(path.read_text()) for path in files}
    one = trees.pop(PACKAGE / "private.py")
    own = own_names(list(trees.values()))
    found = {path.name: list(private(tree, own)) for path, tree in trees.items()}
    assert {name: places for name, places in found.items() if places} == {}
    assert len(list(private(one, own))) > 20


@pytest.mark.parametrize(
    "line",
    [
        "from torch._ops import OpOverload",
        "from torch.nn.modules.conv import _ConvNd",
        "import torch._dynamo",
        "found = torch._C.has_mps",
        "found = node.target._schema",
        "found = getattr(model, '_orig_mod', None)",
    ],
)
def test_reading_one_is_noticed(line: str) -> None:
    assert list(private(ast.parse(line), set()))


def test_the_private_module_asks_nothing_of_the_package() -> None:
    tree = ast.parse((PACKAGE / "private.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name and name.startswith("fxpath")}
