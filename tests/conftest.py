"""What the tests of the package share with pytest: assertions that are shown, checks, a fixture."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fxpath import passes
from fxpath.graph.edit import Forms
from fxpath.graph.spec import violations
from fxpath.passes import Pass
from fxpath.passes.derive import derive

pytest.register_assert_rewrite("tests.oracles", "tests.support")

from tests.support.command_line import NETS  # noqa: E402

#: Thousands of tests make much the same graphs: what an operation returns is found out once.
MADE = Forms()


def _kept_to(stage: str, step: Pass) -> Pass:
    """A pass whose result is held against what shall hold after it."""

    @functools.wraps(step)
    def checked(
        module: fx.GraphModule, setting: passes.Setting, *more: Any, **named: Any
    ) -> fx.GraphModule:
        result = step(module, setting, *more, **named)
        if isinstance(setting, passes.Setting):  # a test may make up its own
            found = violations(result, stage, setting.captured, MADE)
            assert not found, found
        return result

    return checked


# Whatever a test does, and whoever calls a pass, it keeps what is written in fxpath.graph.spec.
for stage, step in (
    ("folded", passes.fold),
    ("lifted", passes.lift),
    ("reduced", passes.reduce),
    ("reduced", passes.hoist),
    ("lowered", passes.lower),
    ("derived", derive),
):
    checked = _kept_to(stage, step)
    for module in [m for name, m in sys.modules.items() if name.startswith("fxpath.")]:
        for name, value in list(vars(module).items()):
            if value is step:
                setattr(module, name, checked)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of small nets, as the current one."""
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "some_nets", raising=False)
    return tmp_path


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled before a test, and nothing is left behind it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
