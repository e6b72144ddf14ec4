"""`FILE.py:callable`: what lies beside a file is its own, and mistakes in it lead somewhere."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from fxpath.capture.loading import UsageError, load_model
from fxpath_command import main
from tests.support.command_line import fails

MAKE = """
import helper
from torch import nn

def make():
    import late
    net = nn.Linear(3, 2, bias=False)
    nn.init.constant_(net.weight, helper.SCALE * late.SCALE * helper.scale())
    return net
"""
HELPER = """
from inner.deep import SCALE

def scale():
    import later
    return later.SCALE
"""


def folder(place: Path, scale: float) -> Path:
    """A file whose entries are scale ** 3, through four modules that lie beside it."""
    (place / "inner").mkdir(parents=True)
    (place / "net.py").write_text(MAKE)
    (place / "helper.py").write_text(HELPER)
    (place / "inner" / "deep.py").write_text(f"SCALE = {scale}")
    for name in ("late", "later"):
        (place / f"{name}.py").write_text(f"SCALE = {scale}")
    return place / "net.py"


def entry(name: str) -> float:
    model = load_model(name)
    assert isinstance(model, nn.Linear)
    return model.weight[0, 0].item()


def test_two_files_have_helpers_of_one_name(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "a", 2.0), folder(tmp_path / "b", 3.0)
    before, path = set(sys.modules), list(sys.path)
    assert [entry(f"{file}:make") for file in (one, two, one)] == [8.0, 27.0, 8.0]
    left = {name for name in set(sys.modules) - before if "net%2Epy" not in name}
    assert not left and sys.path == path


def test_a_gate_compares_the_two_files_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = folder(tmp_path / "a", 2.0), folder(tmp_path / "b", 3.0)
    argv = ["bound", f"{one}:make", f"{two}:make", "--max-relative", "0.1"]
    assert main([*argv, "--input-shape", "3"]) == 1
    out = capsys.readouterr().out
    assert f"{6 * 8.0:g}" in out and f"{6 * 27.0:g}" in out


def test_a_module_by_name_does_not_stand_in_for_one_beside_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = folder(tmp_path / "a", 2.0), folder(tmp_path / "b", 3.0)
    monkeypatch.chdir(here.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = ("net", "helper", "inner", "inner.deep", "late", "later")
    assert entry("net:make") == 8.0
    by_name = {name: sys.modules[name] for name in names}
    try:
        assert entry(f"{other}:make") == 27.0
        # Those that were imported before are what they were.
        assert {name: sys.modules[name] for name in names} == by_name
        assert entry("net:make") == 8.0
    finally:
        for name in names:
            del sys.modules[name]


def test_a_path_that_a_file_adds_is_its_own(tmp_path: Path) -> None:
    source = (
        "import os, sys\nfrom torch import nn\n"
        "sys.path.append(os.path.join(os.path.dirname(os.path.dirname(__file__)), 'common'))\n"
        "import widths\ndef make():\n    return nn.Linear(widths.WIDTH, 1)\n"
    )
    path = list(sys.path)
    for name, width in (("a", 3), ("b", 5)):
        for part in ("nets", "common"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "common" / "widths.py").write_text(f"WIDTH = {width}")
        (tmp_path / name / "nets" / "net.py").write_text(source)
        model = load_model(f"{tmp_path / name / 'nets' / 'net.py'}:make")
        assert isinstance(model, nn.Linear) and model.in_features == width
    assert sys.path == path and "widths" not in sys.modules


def test_installed_packages_in_the_folder_stay(tmp_path: Path) -> None:
    packages = tmp_path / "env" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "installed_for_good.py").write_text("")
    (tmp_path / "net.py").write_text(
        f"import sys\nsys.path.append({str(packages)!r})\nimport installed_for_good\n"
        "from torch import nn\nmake = nn.Identity"
    )
    load_model(f"{tmp_path / 'net.py'}:make")
    assert sys.modules.pop("installed_for_good").__file__ == os.path.realpath(
        packages / "installed_for_good.py"
    )


def test_what_was_made_goes_on_without_its_modules(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(
        "from __future__ import annotations\nimport torch\nfrom torch import nn\nGAIN = 2.0\n"
        "class Part(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = nn.Linear(3, 2)\n"
        "    def forward(self, x: torch.Tensor) -> torch.Tensor:\n"
        "        return GAIN * torch.relu(self.net(x))\n"
    )
    (tmp_path / "net.py").write_text("from parts import Part\n")
    model = load_model(f"{tmp_path / 'net.py'}:Part")
    assert isinstance(model, nn.Module) and "parts" not in sys.modules
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.net.state_dict())
    with torch.no_grad():
        expected = 2 * (twin.weight.abs().sum() + twin.bias.abs().sum()).item()
    assert fxpath.path_norm(model, (3,)) == pytest.approx(expected, rel=1e-6)


# What is said


@pytest.mark.parametrize("late", [False, True], ids=["on top", "in the callable"])
def test_a_relative_import_names_its_remedy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "outer" / "pack"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "sizes.py").write_text("WIDTH = 3")
    lines = ["from torch import nn", "def make():", "    return nn.Linear(WIDTH, 2)"]
    lines.insert(
        *((2, "    from .sizes import WIDTH") if late else (1, "from .sizes import WIDTH"))
    )
    (package / "net.py").write_text("\n".join(lines))
    said = fails(capsys, "check", f"{package / 'net.py'}:make")
    assert f"line {3 if late else 2}, 'from .sizes import WIDTH', is relative to a package" in said
    assert f"name it outer.pack.net:make, from the folder {tmp_path}" in said
    assert "fxpath file" not in said
    # The remedy is one.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load_model("outer.pack.net:make"), nn.Linear)
    for name in ("outer", "outer.pack", "outer.pack.net", "outer.pack.sizes"):
        del sys.modules[name]


def test_a_relative_import_beside_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts.py").write_text("from ..sizes import WIDTH")
    (tmp_path / "net.py").write_text("import parts")
    said = fails(capsys, "check", f"{tmp_path / 'net.py'}:make")
    assert "line 1 of parts.py, 'from ..sizes import WIDTH'" in said
    up = tmp_path.parent
    assert f"{up.name}.{tmp_path.name}.net:make, from the folder {up.parent}" in said


def test_other_imports_that_fail_are_what_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text("import not_there_at_all")
    said = fails(capsys, "check", f"{tmp_path / 'net.py'}:make")
    assert "ModuleNotFoundError: No module named 'not_there_at_all'" in said


def test_an_attribute_that_is_not_there(tmp_path: Path) -> None:
    source = (
        "from torch import nn\nfrom torch.nn import Linear\nWIDTH = 3\n"
        "class Wide(nn.Module):\n    small = nn.Identity()\n"
        "def mlp(): ...\ndef _own(width): ...\nnet = nn.Identity()\n"
    )
    (tmp_path / "some_file.py").write_text(source)
    file = tmp_path / "some_file.py"

    def said(name: str) -> str:
        with pytest.raises(UsageError) as caught:
            load_model(name)
        return str(caught.value)

    assert said(f"{file}:nope") == f"{file}:nope: no attribute 'nope': there is Wide, mlp, net"
    assert "called without arguments (missing a required argument" in said(f"{file}:_own")
    assert said(f"{file}:mlpp").endswith("no attribute 'mlpp': did you mean mlp?")
    assert said(f"{file}:Wide.smal").endswith("no attribute 'smal': did you mean small?")
    assert said(f"{file}:WIDTH.x").endswith("no attribute 'x'")
    assert "did you mean Flatten" in said("torch.nn:Flaten")
