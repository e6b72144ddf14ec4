"""Files of weights as training frameworks write them; nothing in them is executed."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fxpath.capture.loading.words import UsageError, one_line, plain, some
from fxpath.capture.loading.zips import listed

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".index.json")
_SAVE = "torch.save(model.state_dict(), FILE)"
# What people keep beside the weights.  Nothing of it is imported or called: inert objects stand for
# it, and only tensors are ever looked at.
_BESIDE = re.compile(
    r"(numpy|argparse|collections|pathlib|datetime|decimal|fractions|uuid|omegaconf|lightning"
    r"|pytorch_lightning|lightning_fabric|lightning_utilities)\..+"
    r"|torch\.torch_version\.TorchVersion|typing\.Any"
    r"|builtins\.(int|float|bool|str|bytes|list|tuple|dict|set|frozenset|slice|range|object)"
)


class _Inert:
    """Stands for an object beside the weights, whatever is said of its making and its state."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _InertDict(_Inert):
    """Stands for a kind of dict, of which the entries count."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


class _InertList(_Inert):
    """Stands for a kind of list."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return []


def read_checkpoint(path: Path, said: str) -> Any:
    """The content of a file of weights: tensors in containers.

    Args:
        path: `.safetensors`, the `.index.json` of a sharded checkpoint, or a file of torch.save.
        said: who asks for it, at the head of messages.

    Raises:
        UsageError: if there is no such file, if it is damaged, or if it holds objects that only
            their own code could make: a whole module, a TorchScript program.
    """
    if not path.is_file():
        raise UsageError(f"{said}: no such file")
    try:
        if path.name.endswith(".json"):
            return _read_shards(path)
        return _read_file(path)
    except UsageError as error:
        raise UsageError(f"{said}: {error}") from error
    # Damaged files raise whatever the zip, JSON, pickle or safetensors reader trips over.
    except Exception as error:
        raise UsageError(f"{said}: {advice(path) or _unreadable(error)}") from error


def _read_file(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else _unpickled(path)


def _unpickled(path: Path) -> Any:
    """A file of torch.save, with inert objects for what is known and no tensor."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            listed(file, path.stat().st_size)
    beside: dict[str, type[_Inert]] = {}
    while True:
        allowed: list[Any] = [(stand_in, name) for name, stand_in in beside.items()]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                # Of another protocol of pickle: what cannot be read is an error.
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = _refused_name(error)
            if name is None or name in beside or not _BESIDE.fullmatch(name):
                raise
            beside[name] = type(name, (_kind(name),), {})


def _kind(name: str) -> type[_Inert]:
    """By its name: torch fills nothing but dicts and lists with entries."""
    if name.lower().endswith("dict"):
        return _InertDict
    return _InertList if name.lower().endswith(("list", "deque")) else _Inert


def _refused_name(error: Exception) -> str | None:
    """The class or function that torch.load did not accept."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return None
    # torch leaves the module out of the names of built-in types.
    return plain(found[1] if "." in found[1] else f"builtins.{found[1]}")


def _unreadable(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text advises to load without weights_only, which may run foreign code.
        name = _refused_name(error)
        if name is None:
            return f"cannot be read (damaged, or no file of torch.save); save it with {_SAVE}"
        return (
            f"holds a pickled {name}, and making one may run code: save the weights alone, where "
            f"that code is, with {_SAVE}"
        )
    return f"cannot be read ({one_line(error)}); save it with {_SAVE} or as .safetensors"


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint in several files, by the list of which tensor is where."""
    listing = json.loads(path.read_text(encoding="utf-8"))
    files = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UsageError("not the index of a sharded checkpoint")
    outside = [f for f in files.values() if Path(f).name != f or f.endswith(".json") or "\\" in f]
    if outside:
        raise UsageError(f"names files that are not beside it: {some(outside)}")
    absent = [file for file in sorted(set(files.values())) if not (path.parent / file).is_file()]
    if absent:
        raise UsageError(f"no such file beside it: {some(absent)}")
    shards = {file: _read_file(path.parent / file) for file in sorted(set(files.values()))}
    lost = [name for name, file in files.items() if name not in shards[file]]
    if lost:
        raise UsageError(f"not in the shard that it names: {some(lost)}")
    return {name: shards[file][name] for name, file in files.items()}


def advice(path: Path) -> str | None:
    """What to do with a file that is neither weights nor damaged, by what is in it.

    Returns:
        None if the file is not a known kind of zip archive.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.partition("/")[2] for name in file.namelist()} | set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return None
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return (
            "a TorchScript program, which holds code of its own and no Python model: name the "
            f"model as package.module:callable, and take its weights from where the file is "
            f"trusted: torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt'), then "
            "--checkpoint weights.pt"
        )
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "an exported program, not weights: name it FILE.pt2 and pass it as the MODEL"
    return None
