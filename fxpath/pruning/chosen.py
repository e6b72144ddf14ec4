"""Which layers may lose output channels, as a caller says it."""

from __future__ import annotations

from torch import nn

from fxpath.pruning.channels import Channels, Kept
from fxpath.pruning.choices import Choice, listed, matches, shown
from fxpath.pruning.surgery import places


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
        for pattern in listed(choice):
            matched = {w for w, names in layers.items() if matches(model, names, pattern)}
            if not matched:
                raise ValueError(
                    f"{'exclude' if excluded else 'include'}: {shown(pattern)} matches no layer; "
                    f"there are {', '.join(layers)}"
                )
            chosen |= matched
        why = Kept("excluded by the caller" if excluded else "not included by the caller")
        for weight in layers:
            if (weight in chosen) == excluded:
                found.keep(found.outputs[weight], why)
