"""Where in a checkpoint weights may be, and what is no weights by what it is called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxpath.capture.loading.words import plain

# Components that torch.compile, FSDP, activation checkpointing and data parallelism add to names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
_AVERAGES = {"ema", "swa", "avg", "average", "averages", "averaged", "averaging", "shadow"}
# The words of a key of what training keeps beside the weights, in their names and shapes; a
# momentum encoder, as contrastive learning has it, holds weights.
_TRAINING = re.compile(
    r"(^|_)(optimi[sz]ers?|optims?|opts?|grads?|gradients?|exp_(avg|inf))(_|$)"
    r"|^((first|second)_)?(momentums?|momenta|moments?|velocit(y|ies))(_(buffers?|states?|\d+))*$"
)
_BOUNDARY = re.compile(
    r"[\W_]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])"
)
_DEEPEST = 5
# torch.optim.swa_utils.AveragedModel counts what it has averaged.
_AVERAGED_COUNTER = "n_averaged"


@dataclass(frozen=True)
class Candidate:
    """Tensors by name that could be a state dict.

    Attributes:
        where: the keys that lead there, and which part of what is there; empty for the outermost.
        tensors: by name.
        averaged: whether they are averages of weights, by their key or their form.
        training: whether a key says that they are state of an optimizer, or gradients.
        part_of: where the dict is of which they are one part.
    """

    where: str
    tensors: dict[str, Any]
    averaged: bool = False
    training: bool = False
    part_of: str | None = None


def candidates(
    found: Any, where: str = "", averaged: bool = False, training: bool = False, depth: int = 0
) -> Iterator[Candidate]:
    """Everything in nested containers that could be a state dict.

    Example:
        >>> import torch
        >>> inner = {"weight": torch.ones(1)}
        >>> for each in candidates({"net": inner, "model_ema": inner, "optim": {"grads": inner}}):
        ...     print(each.where, each.averaged, each.training)
        net False False
        model_ema True False
        optim.grads False True
    """
    if not isinstance(found, Mapping):
        return
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    start = f"{where}, " if where else ""
    if tensors:
        of_averages = {name for name in tensors if is_averaged(bare(name).partition(".")[0])}
        every = averaged or len(of_averages) == len(tensors)
        yield Candidate(where, tensors, every, training)
        if (counter := _counter(tensors)) is not None:
            rest = {name: value for name, value in tensors.items() if name != counter}
            here = f"{start}the averages of an AveragedModel"
            yield Candidate(here, rest, True, training, where)
        elif 0 < len(of_averages) < len(tensors):
            # A module and its moving average, both in the state dict of their parent.
            parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            for name, value in tensors.items():
                parts[name in of_averages][name] = value
            yield Candidate(f"{start}all but averages", parts[0], averaged, training, where)
            yield Candidate(f"{start}averages", parts[1], True, training, where)
    if depth < _DEEPEST:
        for key, value in found.items():
            inner = f"{where}.{plain(key)}" if where else plain(key)
            named = averaged or is_averaged(str(key)), training or is_training(str(key))
            yield from candidates(value, inner, *named, depth + 1)


def _counter(tensors: Mapping[str, Any]) -> str | None:
    """The name of the counter, if these are the tensors of an AveragedModel."""
    counters = [name for name in tensors if name.rpartition(".")[2] == _AVERAGED_COUNTER]
    if len(counters) != 1 or len(tensors) == 1:
        return None
    lead = counters[0].removesuffix(_AVERAGED_COUNTER) + "module."
    rest = (name for name in tensors if name != counters[0])
    return counters[0] if all(name.startswith(lead) for name in rest) else None


def _words(key: str) -> list[str]:
    """The words of a key, in lower case."""
    return [word.lower() for word in _BOUNDARY.split(key) if word]


def is_averaged(key: str) -> bool:
    """Whether a key says that weights are averages.

    Example:
        >>> [is_averaged(key) for key in ("model_ema", "modelEMA", "ema2", "cinema", "teacher")]
        [True, True, True, False, False]
    """
    return not _AVERAGES.isdisjoint(_words(key))


def is_training(key: str) -> bool:
    """Whether a key says that tensors are state of an optimizer, or gradients.

    Example:
        >>> [is_training(key) for key in ("optimizer", "exp_avg_sq", "gradNorm", "momentum_buffer")]
        [True, True, True, True]
        >>> [is_training(key) for key in ("adoption", "gradual", "momentum_encoder", "avg")]
        [False, False, False, False]
    """
    return _TRAINING.search("_".join(_words(key))) is not None


def bare(name: str) -> str:
    """The name of a tensor without what wrappers add.

    Example:
        >>> bare("module.0._orig_mod.weight")
        '0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
