"""What to prune and what to spare, as a caller says it: names, and types of modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

One = str | type[nn.Module]
Choice = One | Sequence[One]


def listed(choice: Choice) -> list[One]:
    """The patterns and types of a choice.

    Raises:
        TypeError: for what is neither.
    """
    if not isinstance(choice, (str, type)) and not isinstance(choice, Iterable):
        raise TypeError(f"{choice!r}: pass names with * and ?, types of modules, or a list of them")
    found = [choice] if isinstance(choice, (str, type)) else list(choice)
    for one in found:
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise TypeError(f"{one!r}: pass names with * and ?, or types of modules")
    return found


def shown(one: One) -> str:
    """A pattern or a type, for a message."""
    return repr(one) if isinstance(one, str) else one.__name__


def matches(model: nn.Module, names: Sequence[str], one: One) -> bool:
    """Whether a parameter with these names is meant, by itself or with a module around it."""
    if isinstance(one, str):
        parts = [name.split(".") for name in names]
        around = (".".join(p[:count]) for p in parts for count in range(1, len(p) + 1))
        return any(fnmatchcase(name, one) for name in around)
    modules = dict(model.named_modules(remove_duplicate=False))
    return any(isinstance(modules.get(name.rpartition(".")[0]), one) for name in names)
