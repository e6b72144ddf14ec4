"""Every test starts from the same seeds and uses a bounded number of threads."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.oracles", "tests.support")

from tests.support.command_line import NETS  # noqa: E402

# Under pytest-xdist the workers share the cores; alone, more than four threads only add noise.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of small nets, as the current one."""
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "some_nets", raising=False)
    return tmp_path
