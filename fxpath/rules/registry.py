"""The table: exact ATen overload -> rule.

A rule is called with the pass that lifts the graph, the node, and the node's arguments bound to the
names of the operation's schema (defaults filled in).  It returns the lifted node, or a list of them
for operations with several results, or raises :class:`Refusal`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx
from torch._ops import OpOverload

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

__all__ = ["RULES", "Refusal", "Rule", "rule"]

#: Lifted counterparts of the activations that an operation returns, in the order of its results.
Lifted = fx.Node | list[fx.Node | None]
Rule = Callable[["Lift", fx.Node, dict[str, Any]], Lifted]

RULES: dict[OpOverload, Rule] = {}


class Refusal(Exception):
    """An operation has no exact rule; says why, and what can be done."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Keep both halves of the message."""
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def rule(*overloads: OpOverload) -> Callable[[Rule], Rule]:
    """Register the rule of one or more overloads; a second rule for the same one is an error.

    Raises:
        ValueError: if an overload has a rule already.
    """

    def register(function: Rule) -> Rule:
        for overload in overloads:
            if overload in RULES:
                raise ValueError(f"{overload} has two rules")
            RULES[overload] = function
        return function

    return register
