"""The models and checkpoints that are named on the command line.

A MODEL is one of these:

- the name of a torchvision model, or `timm:NAME`. Its weights are random unless weights or a
  checkpoint are named: those of `torch.manual_seed(0); torchvision.models.get_model(name,
  weights=None)`.
- `hf-hub:NAME` or `local-dir:PATH`, as timm spells them, with their weights unless a checkpoint is
  named; the file with these is read as a checkpoint is: averages beside plain weights are left.
- `package.module:callable`, imported with the current directory on the path, or `FILE.py:callable`;
  the callable is called without arguments and returns a module (a module itself will do).
- a `.pt2` file written by `torch.export.save`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from fxpath.capture.loading.archives import load_program
from fxpath.capture.loading.callables import call
from fxpath.capture.loading.checkpoints import SUFFIXES, advice, read_checkpoint
from fxpath.capture.loading.libraries import (
    BRINGING,
    TIMM,
    brought_weights,
    from_timm,
    from_torchvision,
)
from fxpath.capture.loading.states import fit
from fxpath.capture.loading.words import UsageError
from fxpath.private import keep_versions

Model = nn.Module | ExportedProgram


# timm has a converter for some models, which may also leave tensors out.
_CONVERTED = "(if timm converts it, let a function call timm.create_model: FILE.py:callable)"


def _silent(text: str) -> None:
    """Whoever asks for a model and not for what was done to have it."""


def load_model(
    name: str,
    weights: str | None = None,
    checkpoint: Path | None = None,
    tell: Callable[[str], None] = _silent,
) -> Model:
    """The model that a MODEL argument stands for.

    The state of torch's random numbers is afterwards what it was before.

    Args:
        name: A MODEL argument.
        weights: Name of torchvision's or timm's own weights, such as `"DEFAULT"`; downloaded if
            need be.
        checkpoint: A state dict to load: `.safetensors`, or a file of `torch.save`.
        tell: Is told in one line what was taken of a checkpoint and changed in it, if anything.

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
    own = name.endswith(".pt2") or (":" in name and not name.startswith(TIMM))
    if weights is not None and own:
        raise UsageError(f"{name}: --weights is for torchvision and timm; use --checkpoint FILE")
    if name.endswith(".pt2"):
        if checkpoint is not None:
            raise UsageError(f"{name} has its own weights: leave --checkpoint out")
        return load_program(name)
    with torch.random.fork_rng(devices=[]):
        _seed()
        if name.startswith(TIMM):
            model = from_timm(name, weights)
        else:
            model = call(name, _seed) if own else from_torchvision(name, weights)
    if checkpoint is not None:
        notes = _apply_checkpoint(model, checkpoint, f"--checkpoint {checkpoint}", f"({name})")
    elif name.startswith(BRINGING):
        file, choice = brought_weights(name)
        notes = [choice] if choice else []
        notes += _apply_checkpoint(model, file, f"{name}: {file.name}", _CONVERTED)
    else:
        notes = []
    if notes:
        tell(f"{checkpoint or name}: {'; '.join(notes)}")
    return model


def drawn(name: str) -> bool:
    """Whether a MODEL has random weights where none are named.

    Example:
        >>> drawn("resnet18"), drawn("timm:resnet18"), drawn("net.py:make"), drawn("net.pt2")
        (True, True, False, False)
    """
    return name.startswith("timm:") or not (":" in name or name.endswith(".pt2"))


def _described(path: Path) -> str:
    """What a file is that was given as a model and cannot be one."""
    if not path.is_file():
        return f"no such file; weights go with a model: fxpath ... MODEL --checkpoint {path}"
    return advice(path) or f"holds weights, not a model: fxpath ... MODEL --checkpoint {path}"


def _seed() -> None:
    """Fixes the random numbers of the CPU only: `torch.manual_seed` would change those of GPUs."""
    torch.default_generator.manual_seed(0)


def _apply_checkpoint(model: nn.Module, path: Path, said: str, more: str) -> list[str]:
    """Loads the tensors of a checkpoint that must be exactly the model's, by name and shape.

    Args:
        model: What they are loaded into.
        path: The file.
        said: Where the file comes from, at the head of messages.
        more: What else there is to say if they are not the model's.

    Returns:
        What was taken and changed.
    """
    content = read_checkpoint(path, said)
    own, buffers = model.state_dict(), dict(model.named_buffers(remove_duplicate=False))
    # Older versions of a model may have saved buffers that it makes itself today.
    made = buffers.keys() - own.keys()
    try:
        fitted = fit(content, {**own, **{n: buffers[n] for n in made}}, optional=made)
    except ValueError as error:
        raise UsageError(f"{said}: {error} {more}") from error
    state, notes = fitted.tensors, list(fitted.notes)
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    pairs = {(value.dtype, own[name].dtype) for name, value in floats.items() if name in own}
    if {value.dtype for value in floats.values()} == {torch.float64}:
        # Rounding them to float32 would be another network.
        model.double()
        notes += ["computing in their float64"] * (pairs != {(torch.float64, torch.float64)})
    else:
        words = sorted(f"{a} to {b}".replace("torch.", "") for a, b in pairs if a != b)
        notes += [f"converted {' and '.join(words)}"] if words else []
    with torch.no_grad():
        for key in made & state.keys():
            buffers[key].copy_(state.pop(key))
    loaded = OrderedDict({**own, **state})
    # Names and shapes are those of this version of the model, whichever the file was saved from.
    keep_versions(loaded, own)
    model.load_state_dict(loaded)
    return notes
