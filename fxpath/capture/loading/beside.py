"""What lies beside a file of Python: its for as long as the file is loaded, and nobody else's."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Where installed packages are, also those of an environment that lies in the folder of a file.
_INSTALLED = {"site-packages", "dist-packages"}


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Makes the modules of a folder importable, and has them forgotten afterwards.

    Two files in two folders, each with a `helper.py` beside it, must not get the helper of one: so
    what was imported from the folder, or from a path that the file has added, is no longer found by
    its name, though what was made goes on using it.  A module of that name from the current
    directory is out of sight for as long.

    Args:
        folder: An absolute path.
    """
    before, path = dict(sys.modules), list(sys.path)
    hidden = _hidden(folder)
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    # Files may be younger than the listing of their folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        places = {_real(entry) for entry in {*sys.path} - {*path}} | {_real(folder)}
        for name, module in list(sys.modules.items()):
            if before.get(name) is not module and _is_from(name, module, places, folder):
                del sys.modules[name]
        sys.modules.update(hidden)
        sys.path[:] = path


def _hidden(folder: Path) -> dict[str, ModuleType]:
    """Modules of the current directory whose name a module of the folder has, too."""
    here = _real(os.getcwd())
    if here == _real(folder):
        return {}
    theirs = {file.stem for file in folder.iterdir() if file.suffix == ".py" or file.is_dir()}
    theirs -= {"__main__", "fxpath", "fxpath_command", "fxpath_backend"}
    return {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in theirs and _root(name, module) == here
    }


def _is_from(name: str, module: ModuleType, places: set[Path], folder: Path) -> bool:
    """Whether a module is of these places on the path, or somewhere in the folder."""
    file = _lies(module)
    if file is None or not _INSTALLED.isdisjoint(file.parts):
        return False
    return _root(name, module) in places or _real(folder) in file.parents


def _lies(module: ModuleType) -> Path | None:
    """The file of a module, or the folder of a package without one; None, if it is built in."""
    inside = getattr(module, "__dict__", {})
    file = inside.get("__file__") or next(iter(inside.get("__path__") or ()), None)
    return _real(file) if isinstance(file, str) else None


def _root(name: str, module: ModuleType) -> Path | None:
    """The entry of the path through which a module was found."""
    file = _lies(module)
    above = name.count(".") + (file is not None and file.stem == "__init__")
    return file.parents[above] if file is not None and above < len(file.parents) else None


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def relative_import(error: ImportError, path: Path, attribute: str) -> str | None:
    """What to do about a file that imports from its package, as a file alone has none.

    Args:
        error: What loading the file, or calling what is in it, has raised.
        path: The file.
        attribute: What of it makes the model.

    Returns:
        None if something else was wrong.
    """
    # Frames of Python's own import system have no file.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    if "attempted relative import" not in str(error) or not frames:
        return None
    frame = frames[-1]
    file, line = _real(frame.filename), (frame.line or "").strip()
    if file.parent != _real(path.parent):
        return None
    points = re.match(r"from\s+(\.+)", line)
    depth, folder = len(points[1]) if points else 1, path.parent
    parts = [path.stem]
    while depth > 0 or (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder, depth = folder.parent, depth - 1
    where = f"line {frame.lineno}" + ("" if file == _real(path) else f" of {file.name}")
    return (
        f"{where}, {line!r}, is relative to a package, and a file alone is in none: name it "
        f"{'.'.join(parts)}:{attribute}, from the folder {folder}"
    )
