"""The models and checkpoints that are named on the command line.

A MODEL is one of three things:

- the name of a torchvision model. Its weights are random unless weights or a checkpoint are named:
  those of `torch.manual_seed(0); torchvision.models.get_model(name, weights=None)`.
- `package.module:callable`, imported with the current directory on the path; the callable is called
  without arguments and returns a module (a module itself will do).
- a `.pt2` file written by `torch.export.save`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

__all__ = ["KINDS", "Model", "UsageError", "load_model", "one_line"]

Model = nn.Module | ExportedProgram

KINDS = "a MODEL is a torchvision name, package.module:callable or a .pt2 file"
# Frameworks wrap the state dict of a model into a larger one under these names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


class UsageError(Exception):
    """What the user can put right, said in one line."""


def load_model(name: str, weights: str | None = None, checkpoint: Path | None = None) -> Model:
    """The model that a MODEL argument stands for.

    The state of torch's random numbers is afterwards what it was before.

    Args:
        name: A MODEL argument.
        weights: Name of torchvision's own weights, such as `"DEFAULT"`; downloaded if need be.
        checkpoint: A state dict to load: `.safetensors`, or a file of `torch.save`.

    Returns:
        The module in the mode in which it was built, or the exported program.

    Raises:
        UsageError: If the name, the weights or the checkpoint are not what they should be.
        Exception: Whatever the user's own module or callable raises.

    Example:
        >>> load_model("torch.nn:Flatten")
        Flatten(start_dim=1, end_dim=-1)
    """
    if weights is not None and checkpoint is not None:
        raise UsageError("--weights and --checkpoint exclude each other")
    if Path(name).suffix in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"{name} holds weights, not a model: fxpath ... MODEL --checkpoint {name}")
    if weights is not None and (":" in name or name.endswith(".pt2")):
        raise UsageError(f"{name}: --weights is for torchvision models; use --checkpoint FILE")
    if name.endswith(".pt2"):
        if checkpoint is not None:
            raise UsageError(f"{name} has its own weights: leave --checkpoint out")
        return _load_exported(name)
    with torch.random.fork_rng(devices=[]):
        _seed()
        model = _load_callable(name) if ":" in name else _load_torchvision(name, weights)
    if checkpoint is not None:
        _apply_checkpoint(model, name, checkpoint)
    return model


def _seed() -> None:
    """Fixes the random numbers of the CPU only: `torch.manual_seed` would change those of GPUs."""
    torch.default_generator.manual_seed(0)


def _load_exported(path: str) -> ExportedProgram:
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; write it with torch.export.save")
    try:
        return torch.export.load(path)
    # The format is a zip archive of several parts, each with errors of its own.
    except Exception as error:
        raise UsageError(
            f"{path}: cannot be read ({one_line(error)}); write it with torch.export.save"
        ) from error


def _load_callable(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{name}: {KINDS}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
    # The import may have drawn numbers, if it was the first.
    _seed()
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _load_torchvision(name: str, weights: str | None) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise UsageError(
            f"{name}: torchvision is not installed: pip install 'fxpath[vision]'; {KINDS}"
        ) from error
    known = models.list_models()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known)
        hint = f"did you mean {', '.join(close)}?" if close else "nothing by a similar name;"
        raise UsageError(f"unknown model {name!r}: {hint} {KINDS}")
    name = name.lower()
    if weights is not None:
        return _load_pretrained(models, name, weights)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        # Their default, but without a warning that it will change.
        options["init_weights"] = True
    return models.get_model(name, **options)


def _load_pretrained(models: Any, name: str, weights: str) -> nn.Module:
    choices = models.get_model_weights(name)
    if weights not in choices.__members__:
        raise UsageError(f"{name} has no weights {weights!r}: {', '.join(choices.__members__)}")
    try:
        with _announced():
            return models.get_model(name, weights=choices[weights])
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{name}: cannot download its weights ({one_line(error)}); check the network, leave "
            f"--weights out, or put the file into {torch.hub.get_dir()}/checkpoints"
        ) from error


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Shows torch.hub's announcement of a download to a person, and to no program.

    A program reads results from standard output and what went wrong from standard error.
    """
    sink = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _apply_checkpoint(model: nn.Module, name: str, path: Path) -> None:
    """Loads a state dict whose keys and shapes must be exactly the model's."""
    state = _read_state_dict(path)
    expected = model.state_dict()
    reshaped = [
        f"{key} ({_shape(state[key])}, not {_shape(value)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = {"of another shape": reshaped}
    if not reshaped:
        result = model.load_state_dict(dict(state), strict=False)
        faults = {"missing": result.missing_keys, "unexpected": result.unexpected_keys}
    found = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise UsageError(f"{path} does not fit {name}: {'; '.join(found)}")


def _read_state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    """A state dict from a .safetensors file or from one of torch.save."""
    if not path.is_file():
        raise UsageError(f"--checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UsageError(
            f"--checkpoint {path}: safetensors is not installed: pip install 'fxpath[safetensors]'"
        ) from error
    # Damaged files raise whatever the zip, pickle or safetensors reader trips over.
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError):
            # torch's own text advises to load without weights_only, which may run foreign code.
            reason = "damaged, or more than tensors in it"
        raise UsageError(
            f"--checkpoint {path}: cannot be read ({reason}); "
            "save it with torch.save(model.state_dict(), FILE) or as .safetensors"
        ) from error
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise UsageError(
            f"--checkpoint {path}: not a state dict; save it with "
            "torch.save(model.state_dict(), FILE)"
        )
    if state and all(key.startswith("module.") for key in state):
        # Saved from inside DataParallel.
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def one_line(text: object) -> str:
    r"""The first line that says something; the type's name for an exception that has none.

    Example:
        >>> one_line(RuntimeError("two\nlines")), one_line(KeyboardInterrupt())
        ('two', 'KeyboardInterrupt')
    """
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(text).__name__


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(keys: Sequence[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
