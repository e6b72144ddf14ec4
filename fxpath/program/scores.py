"""Scores by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor


class Scores(dict[str, Tensor]):
    """A dictionary whose KeyError says why a parameter has no score, or what it may be called.

    Example:
        >>> import torch, fxpath
        >>> fxpath.analyze(torch.nn.Linear(2, 1)).scores["wieght"]
        Traceback (most recent call last):
        ...
        KeyError: "'wieght' is no parameter that has a score; close: weight"
    """

    def __init__(self, scores: Mapping[str, Tensor], unscored: Mapping[str, str]) -> None:
        super().__init__(scores)
        self._unscored = dict(unscored)

    def __reduce__(self) -> tuple[type[Scores], tuple[dict[str, Tensor], dict[str, str]]]:
        return type(self), (dict(self), self._unscored)

    def __missing__(self, name: str) -> NoReturn:
        if name in self._unscored:
            raise KeyError(f"{name!r} has no score: {self._unscored[name]}")
        close = difflib.get_close_matches(str(name), [*self, *self._unscored])
        close = close or [known for known in self if known.endswith(f".{name}")][:3]
        hint = f"close: {', '.join(close)}" if close else f"scored are {', '.join(self)}"
        raise KeyError(f"{name!r} is no parameter that has a score; {hint}")
