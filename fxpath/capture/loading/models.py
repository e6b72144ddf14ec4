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
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxpath.capture.loading.archives import load_program
from fxpath.capture.loading.checkpoints import SUFFIXES, advice, read_checkpoint
from fxpath.capture.loading.states import fit_state_dict
from fxpath.capture.loading.words import UsageError, one_line
from fxpath.private import keep_versions
from fxpath_command.words import KINDS

Model = nn.Module | ExportedProgram


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
    if name.lower().endswith(SUFFIXES):
        raise UsageError(f"{name}: {_described(Path(name))}")
    if weights is not None and (":" in name or name.endswith(".pt2")):
        raise UsageError(f"{name}: --weights is for torchvision models; use --checkpoint FILE")
    if name.endswith(".pt2"):
        if checkpoint is not None:
            raise UsageError(f"{name} has its own weights: leave --checkpoint out")
        return load_program(name)
    with torch.random.fork_rng(devices=[]):
        _seed()
        model = _load_callable(name) if ":" in name else _load_torchvision(name, weights)
    if checkpoint is not None:
        _apply_checkpoint(model, name, checkpoint)
    return model


def _described(path: Path) -> str:
    """What a file is that was given as a model and cannot be one."""
    if not path.is_file():
        return f"no such file; weights go with a model: fxpath ... MODEL --checkpoint {path}"
    return advice(path) or f"holds weights, not a model: fxpath ... MODEL --checkpoint {path}"


def _seed() -> None:
    """Fixes the random numbers of the CPU only: `torch.manual_seed` would change those of GPUs."""
    torch.default_generator.manual_seed(0)


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
            f"{name}: torchvision is not installed: pip install 'torch-fxpath[vision]'; {KINDS}"
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
        with _announced(), _weights_only():
            return models.get_model(name, weights=choices[weights])
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{name}: its weights in {torch.hub.get_dir()}/checkpoints hold more than tensors, and "
            "reading them may run code: remove that file"
        ) from error
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


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Has torch.hub, which would unpickle anything, read tensors only."""
    force, lift = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, lift)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _apply_checkpoint(model: nn.Module, name: str, path: Path) -> None:
    """Loads the tensors of a checkpoint that must be exactly the model's, by name and shape."""
    content = read_checkpoint(path)
    own, buffers = model.state_dict(), dict(model.named_buffers(remove_duplicate=False))
    # Older versions of a model may have saved buffers that it makes itself today.
    made = buffers.keys() - own.keys()
    try:
        state = fit_state_dict(content, {**own, **{n: buffers[n] for n in made}}, optional=made)
    except ValueError as error:
        raise UsageError(f"--checkpoint {path}: {error} ({name})") from error
    if {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float64}:
        # Rounding them to float32 would be another network.
        model.double()
    with torch.no_grad():
        for key in made & state.keys():
            buffers[key].copy_(state.pop(key))
    loaded = OrderedDict({**own, **state})
    # Names and shapes are those of this version of the model, whichever the file was saved from.
    keep_versions(loaded, own)
    model.load_state_dict(loaded)
