"""Gates whose values are asked for must be followed: what is inside has a rule."""

from __future__ import annotations

from torch import fx

from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graph import ops
from fxpath.model import Captured

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
