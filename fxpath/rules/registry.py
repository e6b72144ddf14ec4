"""The table: exact ATen overload -> rule.

A rule is called with the builder of the lifted graph, the node, and the node's arguments bound to
the names of the operation's schema (defaults filled in).  It returns the lifted node, or a list of
them for operations with several results, or raises :class:`~fxpath.graph.refusal.Refusal`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxpath.graph.builder import Builder
from fxpath.private import OpOverload

#: Lifted counterparts of the activations that an operation returns, in the order of its results.
Lifted = fx.Node | list[fx.Node | None]
Rule = Callable[[Builder, fx.Node, dict[str, Any]], Lifted]

RULES: dict[OpOverload, Rule] = {}
#: Rules of the generalised path-norm, which count where gates are taken in.
GATED: dict[OpOverload, Rule] = {}


def rule(*overloads: OpOverload, gated: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of one or more overloads; a second rule for the same one is an error.

    Raises:
        ValueError: if an overload has a rule already.
    """
    table = GATED if gated else RULES

    def register(function: Rule) -> Rule:
        for overload in overloads:
            if overload in RULES or overload in GATED:
                raise ValueError(f"{overload} has two rules")
            table[overload] = function
        return function

    return register
