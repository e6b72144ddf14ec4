"""The package is distributed under another name than it is imported: all places agree on it."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from fxpath.capture.loading import UsageError, load_model
from fxpath_command import main

PROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text()
NAME = re.findall(r'^name = "(.+)"$', PROJECT, re.MULTILINE)[0]


def test_extras_build_on_extras_of_this_distribution() -> None:
    extras = set(re.findall(r"^([a-z-]+) = \[", PROJECT.split("optional-dependencies]")[1], re.M))
    named = dict(re.findall(r'"([a-z-]*fxpath)(\[[a-z,-]+\])"', PROJECT))
    assert named.keys() == {NAME}
    wanted = re.findall(rf'"{NAME}\[([a-z,-]+)\]"', PROJECT)
    assert len(wanted) >= 4
    assert set(",".join(wanted).split(",")) <= extras


def test_the_version_is_that_of_this_distribution(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {NAME: "7.8.9"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == "fxpath 7.8.9\n"


def test_without_torchvision_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match=re.escape(f"pip install '{NAME}[vision]'")):
        load_model("resnet18")


def test_the_lowest_torch_is_the_one_that_is_tested() -> None:
    constraints = Path(__file__).parent.parent / ".ci" / "constraints-lowest.txt"
    (lowest,) = re.findall(r"^torch==(\d+\.\d+)\.0$", constraints.read_text(), re.MULTILINE)
    assert f'"torch>={lowest}"' in PROJECT
