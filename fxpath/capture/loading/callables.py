"""Models that the user's own code makes: `package.module:callable` and `FILE.py:callable`.

These run: they are the user's programs, and no files that are only read.  What a file imports is
found beside it while it is loaded and its callable is called, so an `import` within `forward` of
what lies there fails: it belongs to the top of the file.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxpath.capture.loading.beside import importable, relative_import
from fxpath.capture.loading.words import UsageError, some
from fxpath_command.words import KINDS


def call(name: str, seed: Callable[[], None]) -> nn.Module:
    """What a callable returns that is named as `package.module:callable` or `FILE.py:callable`.

    Args:
        name: A MODEL argument.
        seed: Fixes the random numbers; called after the import, which may have drawn some.

    Raises:
        UsageError: If there is no such file, if a part of the name is missing, or if a file imports
            from a package that it is not loaded as a part of.
        TypeError: If what is returned is no module.
        Exception: Whatever the user's code raises.
    """
    place, _, attribute = name.rpartition(":") if ".py:" in name else name.partition(":")
    if not place or not attribute:
        raise UsageError(f"{name}: {KINDS}")
    with _file(Path(place), attribute) if place.endswith(".py") else _imported(place) as module:
        found: Any = module
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise UsageError(f"{name}: no attribute {part!r}{_instead(found, part)}")
            found = getattr(found, part)
        seed()
        model = found if isinstance(found, nn.Module) else _called(found, name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _called(make: Any, name: str) -> Any:
    """What a callable returns; one that takes arguments is refused in words."""
    if not callable(make):
        kind = type(make).__name__
        raise UsageError(f"{name}: {kind} is not callable: name a module, or what makes one")
    # Some callables of C have no signature: they are asked by being called.
    with contextlib.suppress(ValueError):
        asked = inspect.signature(make)
        try:
            asked.bind()
        except TypeError as error:
            said = f"{name}: it is called without arguments ({error}): name a function that is"
            raise UsageError(said) from error
    return make()


def _instead(found: Any, name: str) -> str:
    """Which attributes could have been meant: of a similar name, or all that could make a model."""
    inside = getattr(found, "__dict__", {})
    public = {key: value for key, value in inside.items() if not key.startswith("_")}
    if close := difflib.get_close_matches(name, public):
        return f": did you mean {some(close)}?"
    own = [
        key
        for key, value in public.items()
        if isinstance(value, nn.Module)
        or (callable(value) and getattr(value, "__module__", "") == inside.get("__name__"))
    ]
    return f": there is {some(own)}" if own else ""


@contextlib.contextmanager
def _imported(name: str) -> Iterator[ModuleType]:
    """A module by its name, with the current directory on the path."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    yield importlib.import_module(name)


@contextlib.contextmanager
def _file(path: Path, attribute: str) -> Iterator[ModuleType]:
    """A file run as a module, with what lies beside it importable until its model is made."""
    path = path.absolute()
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    # Its own name would hide a module that is called alike: types.py, model.py in another folder.
    # A point in the name would make it a part of a package.
    spec = importlib.util.spec_from_file_location(
        f"fxpath file {path}".replace("%", "%25").replace(".", "%2E"), path
    )
    assert spec is not None and spec.loader is not None  # for every file that ends with .py
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look the module of a class up by its name.
    sys.modules[spec.name] = module
    with importable(path.parent):
        try:
            spec.loader.exec_module(module)
            yield module
        except ImportError as error:
            if (why := relative_import(error, path, attribute)) is None:
                raise
            raise UsageError(f"{path}: {why}") from error
