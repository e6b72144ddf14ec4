"""Models by the names that torchvision and timm give them; of their weights, tensors are read.

timm itself would take averages before plain weights, and leave a head out that does not fit,
without a word.  So `hf-hub:` and `local-dir:` are built by timm and filled by us: the file of
weights is read as any checkpoint is, and must be the model's, one to one.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxpath.capture.loading.checkpoints import SUFFIXES
from fxpath.capture.loading.words import UsageError, some
from fxpath_command.words import KINDS

#: What a name of timm starts with that brings its weights.
BRINGING = ("hf-hub:", "local-dir:")
#: What a name of timm starts with.
TIMM = ("timm:", *BRINGING)
# What weights are called on the hub, those first that are taken where there are several.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)


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


def from_timm(name: str, weights: str | None) -> nn.Module:
    """A model of timm, with random weights but for those that are named.

    Args:
        name: `timm:NAME`, or `hf-hub:NAME` and `local-dir:PATH` as timm spells them.
        weights: for `timm:NAME` a tag of pretrained weights, or `DEFAULT`.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"{name}: timm is not installed: pip install 'torch-fxpath[timm]'"
        ) from error
    if name.startswith(BRINGING):
        if weights is not None:
            raise UsageError(f"{name} brings its own weights: leave --weights out")
        with _brought(name):
            return timm.create_model(name, pretrained=False)
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


def brought_weights(name: str) -> tuple[Path, str]:
    """The file of weights that `hf-hub:NAME` or `local-dir:PATH` brings.

    Returns:
        The file, and what is to be said of its choice; empty where there was none.

    Raises:
        UsageError: If there is none, or if it is not clear which one counts.
    """
    source, _, place = name.partition(":")
    with _brought(name):
        return _from_hub(place) if source == "hf-hub" else _in_folder(name, Path(place))


def _in_folder(name: str, folder: Path) -> tuple[Path, str]:
    there = sorted(file.name for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    known = [file for file in _FILES if file in there]
    if not there:
        raise FileNotFoundError(f"no file of weights in {folder}: {some(_FILES)}")
    if not known and len(there) > 1:
        raise UsageError(
            f"{name}: it is not clear which of {some(there)} counts: say --checkpoint FILE, or "
            f"name it {_FILES[0]} if it is one"
        )
    first, *rest = known or there
    return folder / first, f"took {first}; left {some(rest)}" if rest else ""


def _from_hub(place: str) -> tuple[Path, str]:
    # timm needs it, too.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = place.partition("@")
    unreached: Exception | None = None
    # Several files, by an index, are not followed: no model of timm is so large.
    for file in (known for known in _FILES if not known.endswith(".json")):
        try:
            found = hf_hub_download(name, file, revision=revision or None)
            return Path(found), "" if file == _FILES[0] else f"took {file}"
        except EntryNotFoundError as error:
            # Not in the cache, and the hub could not be asked: it may be there.
            unreached = error if isinstance(error, LocalEntryNotFoundError) else unreached
    raise unreached or FileNotFoundError(f"no file of weights: {some(_FILES)}")


def _brought(name: str) -> contextlib.AbstractContextManager[None]:
    source, _, place = name.partition(":")
    remedy = "check the name and the network" if source == "hf-hub" else "check the folder"
    return _loaded(name, place, remedy)


def _like(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = [prefix + found for found in difflib.get_close_matches(name, list(known))]
    return f"did you mean {', '.join(close)}?" if close else "nothing by a similar name;"


@contextlib.contextmanager
def _loaded(name: str, where: str, remedy: str) -> Iterator[None]:
    """Says in one line why the weights of a library cannot be had."""
    try:
        with _announced(), _weights_only():
            yield
    except UsageError:
        raise
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
