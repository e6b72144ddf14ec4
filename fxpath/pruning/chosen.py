"""Which layers may lose output channels, as a caller says it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fxpath.pruning.channels import Channels, Kept
from fxpath.pruning.surgery import places

__all__ = ["Choice", "keep_others"]

Choice = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def keep_others(model: nn.Module, found: Channels, include: Choice | None, exclude: Choice) -> None:
    """Keep the output channels of layers that are not included, or excluded.

    Args:
        model: the model.
        found: its channels; those that stay are noted there.
        include: fnmatch patterns on names of parameters, or of modules with all that is in them,
            or types of modules; ``None`` for all.
        exclude: likewise.

    Raises:
        TypeError: for a pattern that is neither a string nor a type.
        ValueError: for one that matches no layer.
    """
    ties = places(model)
    layers = {weight: ties[weight] for weight in found.outputs}
    for choice, excluded in ((include, False), (exclude, True)):
        if choice is None:
            continue
        chosen: set[str] = set()
        for pattern in _listed(choice):
            matched = {w for w, names in layers.items() if _matches(model, names, pattern)}
            if not matched:
                raise ValueError(
                    f"{'exclude' if excluded else 'include'}: {pattern!r} matches no layer; "
                    f"there are {', '.join(layers)}"
                )
            chosen |= matched
        why = Kept("excluded by the caller" if excluded else "not included by the caller")
        for weight in layers:
            if (weight in chosen) == excluded:
                found.keep(found.outputs[weight], why)


def _listed(choice: Choice) -> list[str | type[nn.Module]]:
    listed = [choice] if isinstance(choice, (str, type)) else list(choice)
    for pattern in listed:
        if not isinstance(pattern, str) and not (
            isinstance(pattern, type) and issubclass(pattern, nn.Module)
        ):
            raise TypeError(f"{pattern!r}: pass names with * and ?, or types of modules")
    return listed


def _matches(model: nn.Module, names: Sequence[str], pattern: str | type[nn.Module]) -> bool:
    """Whether a pattern means a weight with these names, or a module around it."""
    if isinstance(pattern, str):
        parts = [name.split(".") for name in names]
        around = (".".join(p[:count]) for p in parts for count in range(1, len(p) + 1))
        return any(fnmatchcase(name, pattern) for name in around)
    holders = (name.rpartition(".")[0] for name in names)
    return any(isinstance(model.get_submodule(path), pattern) for path in holders)
