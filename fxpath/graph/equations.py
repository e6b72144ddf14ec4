"""Contractions of activations with weights: ``"x,weight->out"``, a letter for each axis.

As in ``torch.einsum``, letters that the result lacks are summed over, and axes of length 1
broadcast.  The letters say all that passes ask of a contraction: which axes are mixed, what it
costs, which are its channels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Letters:
    """The three terms of an equation."""

    x: str
    weight: str
    out: str

    @functools.cached_property
    def matrix(self) -> tuple[str, str] | None:
        """The input and the output letter of a weight that is a matrix along one axis of x.

        Example:
            >>> letters("bchw,dc->bdhw").matrix, letters("bi,bij->bj").matrix
            (('c', 'd'), None)
        """
        if len(self.weight) != 2 or len({*self.x}) != len(self.x):
            return None
        for into, made in ((self.weight[0], self.weight[1]), (self.weight[1], self.weight[0])):
            if into in self.x and made not in self.x and self.x.replace(into, made) == self.out:
                return into, made
        return None

    @functools.cached_property
    def dense(self) -> bool:
        """Whether it is ``x @ weight.T``: a linear layer on the last axis."""
        found = self.matrix
        return found is not None and found == (self.x[-1], self.weight[0])

    def sizes(self, x: Sequence[int], weight: Sequence[int]) -> Mapping[str, int]:
        """Extents by letter."""
        found: dict[str, int] = {}
        for term, shape in ((self.x, x), (self.weight, weight)):
            for letter, size in zip(term, shape, strict=True):
                found[letter] = max(size, found.get(letter, 1))  # of length 1: broadcast
        return found

    @property
    def summed(self) -> list[str]:
        """Letters that are summed over, each once."""
        return [c for c in dict.fromkeys(self.x + self.weight) if c not in self.out]


@functools.cache
def letters(equation: str) -> Letters:
    """Take an equation apart; it has no ellipsis."""
    inputs, out = equation.split("->")
    x, weight = inputs.split(",")
    return Letters(x, weight, out)


def linear(rank: int) -> str:
    """A matrix ``[out, in]`` along the last of ``rank`` axes.

    Example:
        >>> linear(3)
        'abc,dc->abd'
    """
    x, made = _NAMES[:rank], _NAMES[rank]
    return f"{x},{made}{x[-1]}->{x[:-1]}{made}"


def product(x: int, weight: int, weight_first: bool) -> str:
    """``weight @ x`` if ``weight_first``, else ``x @ weight``, by numbers of axes.

    Example:
        >>> product(3, 2, False), product(2, 1, True)
        ('Zab,bc->Zac', 'bc,b->c')
    """
    first, second = (weight, x) if weight_first else (x, weight)
    left, right = "ab"[-min(first, 2) :], "bc"[: min(second, 2)]
    out = "a" * (first > 1) + "c" * (second > 1)
    terms = f"...{left}" if first > 2 else left, f"...{right}" if second > 2 else right
    both = terms[::-1] if weight_first else terms
    out = f"...{out}" if max(first, second) > 2 else out
    return spelled(f"{both[0]},{both[1]}->{out}", x, weight)


def spelled(equation: str, x: int, weight: int) -> str:
    """Letters in the place of an ellipsis, for operands of so many axes.

    Example:
        >>> spelled("...i,oi->...o", 3, 2)
        'YZi,oi->YZo'
    """
    inputs, out = equation.split("->")
    free = [c for c in _NAMES if c not in equation]
    terms, longest = [], ""
    for term, rank in zip(inputs.split(","), (x, weight), strict=True):
        hidden = rank - len(term.replace("...", ""))
        named = "".join(free[len(free) - hidden :]) if "..." in term else ""
        longest = max(longest, named, key=len)
        terms.append(term.replace("...", named))
    return f"{','.join(terms)}->{out.replace('...', longest)}"
