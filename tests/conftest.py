"""What the tests of the package share with pytest: helpers whose assertions are shown, a fixture."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.oracles", "tests.support")

from tests.support.command_line import NETS  # noqa: E402


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of small nets, as the current one."""
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "some_nets", raising=False)
    return tmp_path
