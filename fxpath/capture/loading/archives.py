"""Exported programs from `.pt2` files, without unpickling and without evaluating their strings."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fxpath.capture.loading.vetting import vet
from fxpath.capture.loading.words import UsageError, one_line
from fxpath.capture.loading.zips import Refused, listed
from fxpath.private import archive_schema, archived_device, archived_dtype, archived_program

_WRITE = "write it with torch.export.save"
# What a file of pickles starts with: a zip archive of torch.save, or the pickle itself.
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load_program(path: str) -> ExportedProgram:
    """Read what `torch.export.save` wrote; nothing in the file is executed, compiled code ignored.

    Args:
        path: a `.pt2` file, of torch 2.8 or later, or of the older format.

    Raises:
        UsageError: if it is something else, is damaged, or holds what cannot be read safely:
            pickled objects beside tensors, compiled code only, foreign operations.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; {_WRITE}")
    try:
        with zipfile.ZipFile(path) as file:
            return _Archive(file, Path(path).stat().st_size).program()
    except Refused as error:
        raise UsageError(f"{path}: refused, for {error}") from error
    # Damaged files raise whatever the zip, JSON or tensor reader trips over.
    except Exception as error:
        reason = one_line(error) if isinstance(error, zipfile.BadZipFile) else _reason(error)
        raise UsageError(f"{path}: cannot be read ({reason}); {_WRITE}") from error


def holds_only_code(path: Path) -> bool:
    """Whether a `.pt2` file is a package of compiled code, without an exported program."""
    with zipfile.ZipFile(path) as file:
        names = [member.filename for member in listed(file, path.stat().st_size)]
    return any("data/aotinductor/" in n for n in names) and not any("models/" in n for n in names)


def _reason(error: Exception) -> str:
    """The cause at the bottom: torch wraps it into the text of a traceback."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = one_line(error)
    return text if len(text) < 200 else text[:197] + "..."


class _Archive:
    """The members of one archive by their names inside of it."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self._file = file
        members = listed(file, size)
        root = members[0].filename.partition("/")[0] + "/" if members else ""
        self._members = {member.filename.removeprefix(root): member for member in members}
        # Files of torch.save and bare numbers: these may start with anything.
        self._expected: set[str] = set()

    def program(self) -> ExportedProgram:
        """The one exported program of the archive."""
        if "serialized_exported_program.json" in self._members:
            described, state, constants, inputs = self._old_parts()
        elif "archive_format" in self._members and self._read("archive_format") == b"pt2":
            described, state, constants, inputs = self._parts()
        else:
            raise Refused("it is not an exported program")
        self._check_disguised()
        data = vet(archive_schema().ExportedProgram, json.loads(described), "program")
        for name in (*state, *constants):
            vet(archive_schema().InputToParameterSpec, {"parameter_name": name}, "a tensor")
        return _assemble(data, state, constants, inputs)

    def _parts(self) -> tuple[bytearray, dict[str, Any], dict[str, Any], Any]:
        """Description, weights, constants and sample inputs in the format since torch 2.8."""
        if self._read("archive_version") != b"0":
            raise Refused("it is of a later format than this torch reads")
        if "byteorder" in self._members and self._read("byteorder").decode() != sys.byteorder:
            raise Refused("its numbers are of the other byte order")
        models = [n for n in self._members if n.startswith("models/") and n.endswith(".json")]
        if not models and any(name.startswith("data/aotinductor/") for name in self._members):
            raise Refused("it holds compiled code only, which is never loaded")
        if "models/model.json" not in models and len(models) != 1:
            raise Refused(f"it holds {len(models)} exported programs, none of them named 'model'")
        main = "models/model.json" if "models/model.json" in models else models[0]
        name = main.removeprefix("models/").removesuffix(".json")
        state = self._tensors("data/weights/", name, "weights")
        constants = self._tensors("data/constants/", name, "constants")
        inputs = self._unpickled(f"data/sample_inputs/{name}.pt")
        return self._read(main), state, constants, inputs

    def _old_parts(self) -> tuple[bytearray, dict[str, Any], dict[str, Any], Any]:
        """The same of the format until torch 2.7."""
        kinds = ("state_dict", "constants", "example_inputs")
        files = [f"serialized_{kind}.pt" for kind in kinds]
        # Earlier still, they were called JSON.
        files = [f if f in self._members else f.replace(".pt", ".json") for f in files]
        state, constants, inputs = (self._unpickled(file) for file in files)
        return self._read("serialized_exported_program.json"), state or {}, constants or {}, inputs

    def _read(self, name: str) -> bytearray:
        """A member, in memory that tensors may share."""
        if name not in self._members:
            raise Refused(f"it has no member {name}")
        data = bytearray(self._members[name].file_size)
        with self._file.open(self._members[name]) as stream:
            if cast(io.BufferedIOBase, stream).readinto(data) != len(data):
                raise Refused(f"{name} is shorter than it says")
        return data

    def _unpickled(self, name: str) -> Any:
        """A file of torch.save in which there may be tensors and plain containers only."""
        data = self._read(name)
        self._expected.add(name)
        if not data:
            return None
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            what = "sample inputs" if "inputs" in name else "tensors"
            raise Refused(
                f"{name} holds more than {what} that are plain tensors: reading it may run code"
            ) from error

    def _tensors(self, folder: str, name: str, kind: str) -> dict[str, Tensor]:
        """The weights or constants of a program; tensors of one storage go on sharing it."""
        if f"{folder}{name}.pt" in self._members:
            return dict(self._unpickled(f"{folder}{name}.pt") or {})
        listing = f"{folder}{name}_{kind}_config.json"
        listed_as = archive_schema().PayloadConfig
        config = vet(listed_as, json.loads(self._read(listing)), kind)["config"]
        flat: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for target, payload in config.items():
            file, meta = payload["path_name"], payload.get("tensor_meta")
            if not file.startswith(("weight_", "tensor_")):
                raise Refused(f"{target} is an object in {file}, not a tensor")
            if payload["use_pickle"] or meta is None:
                tensors[target] = self._unpickled(folder + file)
                continue
            self._expected.add(folder + file)
            if file not in flat:
                flat[file] = _numbers(self._read(folder + file), meta["dtype"])
            tensor = _view(flat[file], meta, target)
            if flat[file].nbytes != tensor.nbytes and self._starts_pickled(folder + file):
                raise Refused(f"{file} holds a pickle, not the numbers of {target}")
            if payload["is_param"]:
                tensor = torch.nn.Parameter(tensor, requires_grad=meta["requires_grad"])
            tensors[target] = tensor
        return tensors

    def _check_disguised(self) -> None:
        """Refuses pickles where no reader expects one, though none would be read."""
        for name in self._members:
            if name not in self._expected and self._starts_pickled(name):
                raise Refused(f"{name} holds a pickle")

    def _starts_pickled(self, name: str) -> bool:
        with self._file.open(self._members[name]) as stream:
            return stream.read(4).startswith(_PICKLED)


def _numbers(data: bytearray, dtype: int) -> Tensor:
    """The entries of a storage, in one dimension."""
    kind = archived_dtype(dtype)
    return torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)


def _view(numbers: Tensor, meta: dict[str, Any], name: str) -> Tensor:
    """One tensor in a storage, on the device where it was."""
    sizes, strides = (
        tuple(entry.get("as_int", -1) for entry in meta[key]) for key in ("sizes", "strides")
    )
    if not numbers.numel() and 0 not in sizes:
        # torch.export.load makes them zeros.
        raise Refused(f"{name} has no values: the program was exported from fake tensors")
    offset = meta["storage_offset"].get("as_int", -1)
    device = archived_device(meta["device"])
    if device.type == "meta":
        raise Refused(f"{name} has no values: the program was exported on the meta device")
    return numbers.as_strided(sizes, strides, offset).to(device)


def _assemble(
    data: dict[str, Any], state: dict[str, Any], constants: dict[str, Any], inputs: Any
) -> ExportedProgram:
    """The program of vetted data; whatever was pickled has been read by now."""
    for name, value in {**state, **constants}.items():
        if not isinstance(value, Tensor):
            raise Refused(f"{name} is a {type(value).__name__}, not a tensor")
    if inputs is not None and not isinstance(inputs, tuple):
        raise Refused("its sample inputs are no tuple of arguments")
    return archived_program(data, state, constants, inputs)
