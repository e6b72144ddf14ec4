"""Certificates, and the tensors that they are about, in the files that they travel in.

Nothing in a file is executed, and compiled code is never loaded.
"""

from __future__ import annotations

import importlib
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxpath.capture.loading.archives import holds_only_code, load_program
from fxpath.capture.loading.words import UsageError, one_line
from fxpath.capture.loading.zips import Refused, listed
from fxpath.certificate import MEMBER, Certificate, fixed_tensors

#: The most that is read as a certificate: there is a row for each layer.
LARGEST = 64 * 2**20


def load_certificate(path: str | Path) -> Certificate:
    """Read the certificate that a file carries.

    Args:
        path: a `.pt2` file (an exported program, or compiled by AOTInductor), `.onnx`,
            `.safetensors`, or the text itself as `.json`.

    Returns:
        The :class:`~fxpath.Certificate`; whether it holds is for :func:`fxpath.verify` to say.

    Raises:
        ValueError: if the file cannot be read, or holds no certificate.
        ImportError: for `.onnx`, where the package onnx is missing.

    Example:
        >>> import fxpath, tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> path = Path(tempfile.mkdtemp()) / "fxpath.json"
        >>> _ = path.write_text(fxpath.certify(model).to_json())
        >>> fxpath.verify(load_certificate(path), model)
        []
    """
    path = Path(path)
    read = _READERS.get(path.suffix)
    if read is None:
        raise ValueError(f"{path}: certificates travel in {', '.join(_READERS)}")
    try:
        text = read(path)
    except (OSError, SafetensorError, zipfile.BadZipFile, Refused, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error
    if text is None:
        raise ValueError(f"{path}: holds no certificate, an entry {MEMBER}")
    try:
        return Certificate.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def stored_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors by name in a file that carries a certificate.

    Returns:
        None where there are none that can be read: compiled code, a certificate alone.

    Raises:
        UsageError: if the file is damaged, or not what its name says.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if path.suffix == ".pt2" and not holds_only_code(path):
        program = load_program(str(path))
        return {**fixed_tensors(program.constants), **program.state_dict}
    if path.suffix == ".onnx":
        tensors = _initializers(path)
        return {**fixed_tensors(tensors), **tensors}
    return None


def _initializers(path: Path) -> dict[str, Tensor]:
    """The tensors of an ONNX file, also of one whose weights lie beside it."""
    onnx = _onnx(path)
    found: dict[str, Tensor] = {}
    try:
        for each in onnx.load(str(path)).graph.initializer:
            if each.name in found:
                raise Refused(f"it has two initializers {each.name}")
            array = onnx.numpy_helper.to_array(each)
            # numpy has no bfloat16 that torch knows, but its bytes.
            raw = torch.from_numpy(array.reshape(-1).view("uint8").copy())
            dtype: torch.dtype = getattr(torch, array.dtype.name)
            found[each.name] = raw.view(dtype).reshape(array.shape)
    # Damaged files raise whatever protobuf and numpy trip over.
    except Exception as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
    return found


def _in_zip(path: Path) -> str | None:
    with zipfile.ZipFile(path) as file:
        members = listed(file, path.stat().st_size)
        # All members of an archive of torch lie in one folder, which has any name.
        found = [m for m in members if m.filename.partition("/")[2] == f"extra/{MEMBER}"]
        if not found:
            return None
        if len(found) > 1:
            raise Refused(f"it has two members extra/{MEMBER}")
        if found[0].file_size > LARGEST:
            raise Refused(f"its {MEMBER} is larger than any")
        try:
            return file.read(found[0]).decode()
        # An encrypted member, a compression that is not known, a damaged stream of any kind.
        except (RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise Refused(f"its {MEMBER} cannot be read: {one_line(error)}") from error


def _in_safetensors(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(MEMBER)


def _in_onnx(path: Path) -> str | None:
    onnx = _onnx(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    # Damaged files raise whatever protobuf trips over.
    except Exception as error:
        raise Refused(f"it is no ONNX file: {one_line(error)}") from error
    found = [p.value for p in model.metadata_props if p.key == MEMBER]
    if len(found) > 1:
        raise Refused(f"it has two entries {MEMBER}")
    return next(iter(found), None)


def _in_json(path: Path) -> str | None:
    return path.read_text(encoding="utf-8")


def _onnx(path: Path) -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            f"{path}: reading it takes the package onnx: pip install 'torch-fxpath[onnx]'"
        ) from error


_READERS = {
    ".pt2": _in_zip,
    ".onnx": _in_onnx,
    ".safetensors": _in_safetensors,
    ".json": _in_json,
}
