"""Models that the user's own code makes: `package.module:callable` and `FILE.py:callable`.

These run: they are the user's programs, and no files that are only read.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxpath.capture.loading.words import UsageError
from fxpath_command.words import KINDS


def call(name: str, seed: Callable[[], None]) -> nn.Module:
    """What a callable returns that is named as `package.module:callable` or `FILE.py:callable`.

    Args:
        name: A MODEL argument.
        seed: Fixes the random numbers; called after the import, which may have drawn some.

    Raises:
        UsageError: If there is no such file, or a part of the name is missing.
        TypeError: If what is returned is no module.
        Exception: Whatever the user's code raises.
    """
    place, _, attribute = name.rpartition(":") if ".py:" in name else name.partition(":")
    if not place or not attribute:
        raise UsageError(f"{name}: {KINDS}")
    with _file(Path(place)) if place.endswith(".py") else _imported(place) as module:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
        seed()
        model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"returned a {type(model).__name__}, not a torch.nn.Module")
    return model


@contextlib.contextmanager
def _imported(name: str) -> Iterator[ModuleType]:
    """A module by its name, with the current directory on the path."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    yield importlib.import_module(name)


@contextlib.contextmanager
def _file(path: Path) -> Iterator[ModuleType]:
    """A file run as a module, with what lies beside it importable until its model is made."""
    path = path.absolute()
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    # Its own name would hide a module that is called alike: types.py, model.py in another folder.
    spec = importlib.util.spec_from_file_location(f"fxpath file {path}", path)
    assert spec is not None and spec.loader is not None  # for every file that ends with .py
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look the module of a class up by its name.
    sys.modules[spec.name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
