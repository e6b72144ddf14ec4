"""Which of a checkpoint's tensors are those of a model: found by content, never by guess.

Training code nests state dicts, wraps models and keeps averages, masks and counters beside the
weights.  A set of tensors is taken for the model's if names and shapes agree one to one, but for
prefixes that all names have and for components that wrappers add.  Nothing is left out in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxpath.capture.loading.candidates import Candidate, bare, candidates, is_training
from fxpath.capture.loading.words import by, plain, some

_COUNTER = "num_batches_tracked"
# weight norm, spectral norm, torch.nn.utils.parametrize
_PARAMETRIZED = re.compile(r"_(g|v|u|orig)$|(^|\.)parametrizations\.")
_NAMED = "named as state of an optimizer or gradients are"


@dataclass(frozen=True)
class Fitted:
    """The tensors for a model, and what was done to have them.

    Attributes:
        tensors: as :func:`fit_state_dict` returns them.
        notes: what was taken, left, renamed and multiplied, in half a line each; empty for a state
            dict that is the model's as it is.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def fit_state_dict(
    found: Any, model: Mapping[str, Tensor], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors for a model's state dict in what a checkpoint holds.

    Taken are: a state dict as it is; one nested in dicts, under any key; prefixes common to all
    names (`module.`, `model.`, ...); `_orig_mod` and other components of wrappers; pruned weights
    as `weight_orig * weight_mask`.  Where averaged weights (EMA) lie beside plain ones, the plain
    ones are taken.  State of an optimizer and gradients, by the keys that they are under, are never
    taken.  Batch counters may be missing, and so may the second name of a tied tensor.

    Args:
        found: a state dict, or containers with one somewhere inside.
        model: the model's own state dict, which is only read.
        optional: names in `model` that may be missing.

    Returns:
        Name in `model` -> tensor of that shape: all names that are not optional, in the order of
        `model`.  Tensors are those of the checkpoint, on its device and in its precision.

    Raises:
        ValueError: in one line: names that are missing or unexpected, or of another shape; two
            state dicts that fit and differ; tensors that are complex, quantized, sparse or in 8
            bits; weights behind a parametrization that the model does not have; a weight that is
            there both pruned and with its mask, or a mask of another shape than its weight.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = {"module." + name: value for name, value in model.state_dict().items()}
        >>> list(fit_state_dict({"epoch": 3, "net": state}, model.state_dict()))
        ['weight', 'bias']
    """
    return fit(found, model, optional).tensors


def fit(found: Any, model: Mapping[str, Tensor], optional: Collection[str] = ()) -> Fitted:
    """:func:`fit_state_dict`, with what was done in words.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = {"module." + name: value for name, value in model.state_dict().items()}
        >>> fit({"epoch": 3, "net": state}, model.state_dict()).notes
        ('took net', 'dropped the prefix module.')
    """
    own = {name: value for name, value in model.items() if isinstance(value, Tensor)}
    needed = {n for n in own if n not in optional and not n.endswith(_COUNTER)}
    first_names = {_identity(own[name]) for name in needed}
    found_sets = list(candidates(found))
    if not found_sets:
        raise ValueError("holds no state dict: tensors by name are missing")
    fits: list[tuple[Candidate, Fitted]] = []
    for each in found_sets:
        # Optimizers keep thousands of small dicts of tensors.
        if len(each.tensors) >= len(first_names):
            fitted = _fit(each.tensors, own, needed)
            if not isinstance(fitted, str):
                fits.append((each, fitted))
    weights = [fit for fit in fits if not fit[0].training]
    if not weights:
        raise ValueError(_unfit(found_sets, [each for each, _ in fits], own, needed))
    # Averages count where there is nothing else.
    (chosen, fitted), *others = [fit for fit in weights if not fit[0].averaged] or weights
    for other, tensors in others:
        if not _alike(fitted.tensors, tensors.tensors):
            raise ValueError(
                "holds two state dicts that fit the model and differ, "
                f"{chosen.where or 'the outermost'} and {other.where}: save the one that counts "
                "alone"
            )
    taken = [f"took {chosen.where}"] if chosen.where else []
    left = [
        each.where
        for each, _ in weights
        if each.averaged and (each.part_of is None or each.part_of != chosen.part_of)
    ]
    if left and not chosen.averaged:
        taken.append(f"left {some(left)}")
    return Fitted(fitted.tensors, (*taken, *fitted.notes))


def _unfit(
    found: list[Candidate],
    training: list[Candidate],
    own: Mapping[str, Tensor],
    needed: Collection[str],
) -> str:
    """Why nothing of what was found is taken, though some of it may fit and be no weights."""
    weights = [each for each in found if not each.training]
    if not weights:
        places = some(each.where for each in found)
        return f"holds no weights: what is under {places} is {_NAMED}"
    closest = max(weights, key=lambda each: _likeness(each.tensors, own))
    place = f" (in {closest.where})" if closest.where else ""
    fault = f"does not fit the model{place}: {_fit(closest.tensors, own, needed)}"
    if training:
        fault += f"; what is under {some(each.where for each in training)} fits, but is {_NAMED}"
    return fault


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _likeness(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    """How many tensors agree in shape and in the last part of their name."""
    a, b = (
        Counter((name.rpartition(".")[2], tuple(value.shape)) for name, value in tensors.items())
        for tensors in (state, own)
    )
    return (a & b).total()


def _fit(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str]
) -> Fitted | str:
    """The tensors by the model's names, or what is in the way of the closest reading."""
    closest: tuple[int, str] | None = None
    for reading, done in _READINGS:
        tensors = reading(state, own)
        if isinstance(tensors, str):
            return tensors
        for names in _renamings(list(tensors), list(own)):
            renamed = {new: tensors[old] for old, new in names.items()}
            fault = _fault(renamed, own, needed)
            if fault is None:
                fewer = len(state) - len(tensors)
                notes = [*_renamed(names), *([done.format(fewer)] if done else [])]
                return Fitted(_complete(renamed, own, needed), tuple(notes))
            agreeing = sum(
                name in own and own[name].shape == value.shape for name, value in renamed.items()
            )
            if closest is None or agreeing > closest[0]:
                closest = agreeing, fault
    return closest[1] if closest is not None else "it is empty"


def _renamed(names: Mapping[str, str]) -> list[str]:
    """What became of a checkpoint's names, old -> new, in half a line."""
    changed = [(old, new) for old, new in names.items() if old != new]
    if not changed:
        return []
    for verb, pairs in (("dropped", changed), ("added", [(new, old) for old, new in changed])):
        prefixes = {long.removesuffix(short) for long, short in pairs}
        if len(prefixes) == 1 and all(long.endswith(short) for long, short in pairs):
            return [f"{verb} the prefix {plain(prefixes.pop())}"]
    old, new = changed[0]
    return [f"renamed {len(changed)} tensors, the first from {plain(old)} to {new}"]


def _unmasked(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor] | str:
    """Pruned weights as torch.nn.utils.prune computes them: weight_orig * weight_mask."""
    merged = dict(state)
    for name, value in state.items():
        stem, _, kind = name.rpartition("_")
        masked = f"{stem}_mask"
        if kind != "orig" or masked not in state:
            continue
        mask = state[masked]
        if stem in state:
            return (
                f"{plain(stem)} is there beside {plain(name)} and {plain(masked)}, of which it is "
                "the product: save it, or the two"
            )
        for each, tensor in ((name, value), (masked, mask)):
            if (fault := _unusable(tensor)) is not None:
                return f"{plain(each)} {fault}"
        if mask.shape != value.shape:
            return (
                f"{plain(masked)} is {by(mask.shape)}, and {plain(name)} {by(value.shape)}: a mask "
                "has the shape of its weight"
            )
        del merged[name], merged[masked]
        merged[stem] = value.detach() * mask.detach().to(value.dtype)
    return merged


def _weight_norm(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes and directions of weight norm by the other of the two names that torch has."""
    if any("parametrizations." in name for name in own):
        pattern, named = re.compile(r"([^.]+)_([gv])$"), r"parametrizations.\1.original\2"
    else:
        pattern, named = re.compile(r"parametrizations\.([^.]+)\.original([01])$"), r"\1_\2"
    other = {"g": "0", "v": "1", "0": "g", "1": "v"}
    return {
        pattern.sub(lambda m: m.expand(named)[:-1] + other[m[2]], name): value
        for name, value in state.items()
    }


#: Ways to read the tensors, and what was done where they fit.
_READINGS: tuple[tuple[Callable[..., dict[str, Tensor] | str], str], ...] = (
    (lambda state, own: dict(state), ""),
    (_unmasked, "multiplied in the masks of pruning ({})"),
    (_weight_norm, "named weight norm as the model does"),
)


def _renamings(names: list[str], own: list[str]) -> Iterator[dict[str, str]]:
    """Ways to read a checkpoint's names as a model's: old name -> new name."""
    yield {name: name for name in names}
    short, short_own = {n: bare(n) for n in names}, {bare(n): n for n in own}
    if len(set(short.values())) < len(names) or len(short_own) < len(own):
        return
    prefix, prefix_own = _prefix(list(short.values())), _prefix(list(short_own), every=True)
    for dropped in range(len(prefix) + 1):
        if any(is_training(part) for part in prefix[:dropped]):
            return
        lead = "".join(f"{part}." for part in prefix[:dropped])
        for added in range(len(prefix_own) + 1):
            start = "".join(f"{part}." for part in prefix_own[:added])
            new = {
                # A name without the others' prefix is no name of the model, whatever is left of it.
                old: start + name[len(lead) :] if name.startswith(lead) else f"{name} (no {lead})"
                for old, name in short.items()
            }
            yield {old: short_own.get(name, name) for old, name in new.items()}


def _prefix(names: list[str], every: bool = False) -> list[str]:
    """Leading components that all names have, or most; the last one is a tensor's."""
    paths = [name.split(".")[:-1] for name in names]
    prefix: list[str] = []
    enough = len(names) / 2
    while True:
        ((first, count),) = Counter(tuple(path[:1]) for path in paths).most_common(1) or [((), 0)]
        if not first or count < len(names) and (every or count <= enough):
            return prefix
        prefix.append(first[0])
        paths = [path[1:] for path in paths if path[:1] == [first[0]]]


def _identity(tensor: Tensor) -> object:
    """Equal for two names of one tensor."""
    if not tensor.numel() or tensor.device.type == "meta" or tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _fault(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str]
) -> str | None:
    """Why tensors are not those of a model."""
    names: dict[object, list[str]] = {}
    for name, value in own.items():
        names.setdefault(_identity(value), []).append(name)
    missing = [
        name
        for name in own
        if name in needed and not any(same in given for same in names[_identity(own[name])])
    ]
    unexpected = [name for name in given if name not in own and not _counts(name, own)]
    hidden = [n for n in unexpected if _PARAMETRIZED.search(n)]
    if hidden and missing:
        return (
            f"{some(hidden)} belong to a parametrization that the model does not have: remove it "
            "before saving (remove_parametrizations, remove_weight_norm), or give it to the model"
        )
    reshaped = [
        f"{plain(name)} ({by(given[name].shape)}, not {by(value.shape)})"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape and not name.endswith(_COUNTER)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    faults = [f"{len(found)} {kind}: {some(found)}" for kind, found in kinds.items() if found]
    if faults:
        return "; ".join(faults)
    unread = (
        f"{plain(n)} {why}" for n in given if n in own and (why := _unreadable(given[n], own[n]))
    )
    if (fault := next(unread, None)) is not None:
        return fault
    for same in names.values():
        present = [given[name] for name in same if name in given]
        if not all(_same(present[0], other) for other in present[1:]):
            return f"{some(same)} are one tensor in the model, but differ here"
    return None


def _counts(name: str, own: Mapping[str, Tensor]) -> bool:
    """A counter of a batch norm, which has no part in what the model computes."""
    stem, _, last = name.rpartition(_COUNTER)
    return not last and f"{stem}running_mean" in own


def _unreadable(value: Tensor, own: Tensor) -> str | None:
    """Why a tensor cannot stand for one of the model's."""
    if type(value) not in (Tensor, torch.nn.Parameter, type(own)):
        return f"is a {type(value).__name__}, not a plain tensor"
    if (fault := _unusable(value)) is not None:
        return fault
    if value.is_floating_point() != own.is_floating_point():
        return f"is {value.dtype}, and {own.dtype} in the model"
    return None


def _unusable(value: Tensor) -> str | None:
    """Why a tensor is none of real numbers, one after the other."""
    if value.is_complex():
        return "is complex: path-norms are of real networks"
    if value.is_quantized:
        return "is quantized: save its dequantize()"
    if value.layout != torch.strided or value.is_nested:
        return f"is not dense ({value.layout}): save its to_dense()"
    if value.device.type == "meta":
        return "has no values: it was saved from the meta device"
    if value.is_floating_point() and value.dtype.itemsize == 1:
        return f"is {value.dtype} and without its scale: save it in float32"
    return None


def _complete(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str]
) -> dict[str, Tensor]:
    """In the order of the model, tied tensors under each of their names."""
    held = {_identity(own[name]): value for name, value in given.items() if name in own}
    result = {}
    for name, value in own.items():
        found = given.get(name, held.get(_identity(value)) if name in needed else None)
        if found is not None and found.shape == value.shape:
            result[name] = found
    return result
