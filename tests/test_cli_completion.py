"""The tab key: what argcomplete answers to a shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxpath_command
from fxpath_command.completion import models
from fxpath_command.parser import parse

ROOT = Path(fxpath_command.__file__).parent.parent


def offered(folder: Path, line: str) -> list[str]:
    """What a shell is told could stand at the end of a line."""
    file = folder / "answer"
    asked = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(file),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, "-m", "fxpath_command"]
    result = subprocess.run(command, capture_output=True, text=True, env=asked, cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return sorted(word.strip() for word in file.read_text().splitlines())


def test_what_the_tab_key_offers(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    pytest.importorskip("torchvision")
    (tmp_path / "alex.py").write_text("def make(): ...\ndef more(x): ...")
    (tmp_path / "alex.pt2").touch()
    (tmp_path / "alex.txt").touch()
    commands = ["analyze", "bound", "check", "compare", "export", "graph", "prune", "verify"]
    assert [word for word in offered(tmp_path, "fxpath ") if word[0] != "-"] == commands
    assert offered(tmp_path, "fxpath ana") == ["analyze"]
    assert offered(tmp_path, "fxpath analyze --dt") == ["--dtype"]
    assert offered(tmp_path, "fxpath bound --ga") == ["--gates"]
    assert offered(tmp_path, "fxpath analyze --dtype ") == ["float32", "float64"]
    assert offered(tmp_path, "fxpath check alex") == ["alex.pt2", "alex.py", "alexnet"]


def test_what_is_offered_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("argcomplete")
    known = pytest.importorskip("torchvision.models").list_models()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("def make(): ...\ndef more(x): ...")
    assert sorted(models("")) == sorted([*known, "net.py"])
    assert models("resnet1") == ["resnet18", "resnet101", "resnet152"]
    assert models("net.py:") == ["net.py:make"]


def test_argcomplete_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    assert parse(["check", "resnet18"]).command == "check"
