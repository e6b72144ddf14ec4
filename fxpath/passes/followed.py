"""Gates whose values are asked for must be followed: what is inside has a rule."""

from __future__ import annotations

import math

from torch import fx

from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graph import ops
from fxpath.graph.squashes import squash_of
from fxpath.model import Captured
from fxpath.rules.refused import JUMPING

REMEDY = "write the gate with operations that have a rule, or put gates=True into fxpath.analyze"


def gated(lifted: fx.GraphModule) -> bool:
    """Whether a lifted graph has gates of any kind."""
    return any(node.target in (ops.gate, ops.squash) for node in lifted.graph.nodes)


def require_followed(captured: Captured, lifted: fx.GraphModule, why: str) -> None:
    """Refuse gates inside which something has no rule.

    Args:
        captured: the model.
        lifted: its lifted graph.
        why: what needs the values of gates.

    Raises:
        UnsupportedModelError: naming each such gate, and what is inside.
    """
    problems = [
        problem(node.meta["origin"], f"{why}, and {node.meta['unfollowed']}", REMEDY)
        for node in lifted.graph.nodes
        if node.target is ops.gate and "unfollowed" in node.meta
    ]
    if problems:
        raise UnsupportedModelError(SupportReport(tuple(problems), captured.inputs))


def check_bounded(captured: Captured, lifted: fx.GraphModule) -> None:
    """Refuse gates that are not followed, and activations that jump: no bound sees how far.

    Raises:
        UnsupportedModelError: naming them.
    """
    require_followed(captured, lifted, "the bound follows the values of gates")
    problems = []
    for node in lifted.graph.nodes:
        if node.target is ops.squash:
            found = squash_of(node.args[1], tuple(node.args[2]))
            if found is not None and math.isinf(found.lipschitz):
                reason = "it jumps, so that no difference of values bounds what comes out"
                problems.append(problem(node.meta["origin"], reason, JUMPING[1]))
    if problems:
        raise UnsupportedModelError(SupportReport(tuple(problems), captured.inputs))
