"""What could come next on the command line, for shells that ask through argcomplete."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxpath_command.values import makers

__all__ = ["complete", "models"]

_REGISTERED = re.compile(
    r'^@register_model\((?:name="(\w+)")?\)\n(?:.*\n)*?def (\w+)\(', re.MULTILINE
)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process; does nothing where argcomplete is not installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def models(prefix: str, **_: Any) -> list[str]:
    """Models that start like this: names of torchvision, files, and what can be called in one."""
    from argcomplete.completers import FilesCompleter

    if ".py:" in prefix:
        file = prefix.rpartition(":")[0]
        return [f"{file}:{name}" for name in makers(Path(file))]
    files: list[str] = FilesCompleter(["py", "pt2"])(prefix)
    return [*(name for name in _torchvision() if name.startswith(prefix.lower())), *files]


def _torchvision() -> Iterator[str]:
    """The names that `torchvision.models.list_models()` gives, read without importing torch."""
    found = importlib.util.find_spec("torchvision")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for file in Path(place, "models").rglob("*.py"):
            for name, function in _REGISTERED.findall(file.read_text(encoding="utf-8")):
                yield name or function
