"""Models by the names that torchvision and timm give them; of their weights, tensors are read."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxpath.capture.loading.words import UsageError
from fxpath_command.words import KINDS

#: What a name of timm starts with; those but the first bring their weights.
TIMM = ("timm:", "hf-hub:", "local-dir:")


def from_torchvision(name: str, weights: str | None) -> nn.Module:
    """A model of torchvision, with random weights if none are named."""
    try:
        from torchvision import models
    except ImportError as error:
        raise UsageError(
            f"{name}: torchvision is not installed: pip install 'torch-fxpath[vision]'; {KINDS}"
        ) from error
    known = models.list_models()
    if name.lower() not in known:
        raise UsageError(f"unknown model {name!r}: {_like(name.lower(), known)} {KINDS}")
    name = name.lower()
    if weights is not None:
        choices = models.get_model_weights(name)
        if weights not in choices.__members__:
            raise UsageError(f"{name} has no weights {weights!r}: {', '.join(choices.__members__)}")
        where = f"{torch.hub.get_dir()}/checkpoints"
        remedy = f"check the network, leave --weights out, or put the file into {where}"
        with _loaded(name, where, remedy):
            return models.get_model(name, weights=choices[weights])
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        # Their default, but without a warning that it will change.
        options["init_weights"] = True
    return models.get_model(name, **options)


def from_timm(name: str, weights: str | None, own: bool) -> nn.Module:
    """A model of timm.

    Args:
        name: `timm:NAME`, or `hf-hub:NAME` and `local-dir:PATH` as timm spells them.
        weights: for `timm:NAME` a tag of pretrained weights, or `DEFAULT`.
        own: whether `hf-hub:` and `local-dir:` load the weights that they bring.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"{name}: timm is not installed: pip install 'torch-fxpath[timm]'"
        ) from error
    if not name.startswith("timm:"):
        if weights is not None:
            raise UsageError(f"{name} brings its own weights: leave --weights out")
        source, _, place = name.partition(":")
        remedy = "check the name and the network" if source == "hf-hub" else "check the folder"
        with _loaded(name, place, remedy):
            return timm.create_model(name, pretrained=own)
    bare = name.removeprefix("timm:")
    architecture, _, tag = bare.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UsageError(f"unknown model {name!r}: {_like(architecture, known, 'timm:')}")
    wanted = tag if weights in (None, "DEFAULT") else weights
    full = f"{architecture}.{wanted}" if wanted else architecture
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if wanted and full not in known:
        tags = ", ".join(found.partition(".")[2] for found in known) or "there are none"
        raise UsageError(f"timm:{architecture} has no weights {wanted!r}: {tags}")
    with _loaded(name, "the cache", "check the network, or leave --weights out"):
        return timm.create_model(full, pretrained=weights is not None)


def _like(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = [prefix + found for found in difflib.get_close_matches(name, list(known))]
    return f"did you mean {', '.join(close)}?" if close else "nothing by a similar name;"


@contextlib.contextmanager
def _loaded(name: str, where: str, remedy: str) -> Iterator[None]:
    """Says in one line why the weights of a library cannot be had."""
    try:
        with _announced(), _weights_only():
            yield
    except Exception as error:
        if _pickled(error):
            raise UsageError(
                f"{name}: its weights in {where} hold more than tensors, and reading them may run "
                "code: remove that file"
            ) from error
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        said = " ".join(str(error).split())
        said = said if len(said) < 200 else f"{said[:197]}..."
        raise UsageError(f"{name}: cannot get its weights ({said}); {remedy}") from error


def _pickled(error: BaseException | None) -> bool:
    """Whether objects in a file are the cause of an error; timm wraps it into another."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__
    return error is not None


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
