"""Programs in files that other toolchains load."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxpath.certificate import MEMBER
from fxpath.private import compile_ahead, tree_flatten_with_path, tree_unflatten

#: Kinds of files: what their names end with.
KINDS = {"exported": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}


def kind_of(path: Path, kind: str | None) -> str:
    """The kind of file that is asked for.

    Raises:
        ValueError: for another kind, or a name that does not go with it.
    """
    kind = kind or next((k for k, suffix in KINDS.items() if path.suffix == suffix), None)
    if kind is None or KINDS.get(kind) != path.suffix:
        known = ", ".join(f"kind={k!r} as FILE{suffix}" for k, suffix in KINDS.items())
        raise ValueError(f"{path}, kind={kind!r}: there are {known}")
    return kind


def write(exported: ExportedProgram, path: Path, kind: str, certificate: str) -> None:
    """Write an exported program with its certificate.

    The file is complete when it gets its name: one that was there before stays until then.

    Args:
        exported: the program.
        path: of the file.
        kind: a key of ``KINDS``.
        certificate: as text.
    """
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".fxpath-") as folder:
        made = Path(folder) / path.name
        if kind == "exported":
            torch.export.save(exported, made, extra_files={MEMBER: certificate})
        elif kind == "aoti":
            _compile(exported, made, certificate)
        else:
            _translate(exported, made, certificate)
        for each in Path(folder).iterdir():
            # Beside an ONNX file of more than 2 GB lie its weights.
            os.replace(each, path.parent / each.name)


def _compile(exported: ExportedProgram, path: Path, certificate: str) -> None:
    """Compile with AOTInductor."""
    # Otherwise a tensor of eight numbers or less is made part of the code, where no load_constants
    # reaches it, and says nothing of it.
    compile_ahead(exported, str(path), {"always_keep_tensor_constants": True})
    with zipfile.ZipFile(path, "a") as package:
        root = package.namelist()[0].partition("data/")[0]
        package.writestr(f"{root}extra/{MEMBER}", certificate)


def _translate(exported: ExportedProgram, path: Path, certificate: str) -> None:
    """Translate to ONNX."""
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ImportError(
            f"{path}: writing it takes the packages onnx and onnxscript: "
            "pip install 'torch-fxpath[onnx]'"
        ) from error
    with warnings.catch_warnings():
        # What torch's exporter and onnxscript say of their own code.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # Its optimizer would compute everything beforehand, as nothing depends on an input.
        translated = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)
    assert translated is not None
    graph = translated.model.graph
    # A weight that is an input with a default value is exchanged in a running session, or in the
    # file; one that is an initializer alone is folded into what depends on it.
    for name in exported.state_dict:
        graph.inputs.append(graph.initializers[name])
    for value, name in zip(graph.outputs, _result_names(exported), strict=True):
        value.name = name
    translated.model.metadata_props[MEMBER] = certificate
    translated.save(str(path))


def _result_names(exported: ExportedProgram) -> list[str]:
    """Names of a program's results, in their order: ``mantissa``, ``scores.0.weight``."""
    spec: Any = exported.call_spec.out_spec
    paths, _ = tree_flatten_with_path(tree_unflatten(range(spec.num_leaves), spec))
    # All of them are entries of dictionaries.
    return [".".join(str(getattr(key, "key", key)) for key in path) for path, _ in paths]
