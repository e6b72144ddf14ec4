"""From a model to the graph that is run: :func:`take_in`, then :func:`rewrite`.

Each pass is one file and one function of one signature, graph module in, graph module out
(:data:`~fxpath.passes.setting.Pass`); none changes the graph that it is given, and
:mod:`fxpath.graph.spec` says what holds after each.

- ``fold``: frozen batch norms become part of the maps before them, or steps of their own;
- ``lift``: ATen becomes the vocabulary of :mod:`fxpath.graph.ops`, operation by operation, by the
  rules of :mod:`fxpath.rules`;
- ``reduce``: positions that are equal for all weights are kept once; ``classes`` finds them,
  ``bases`` chooses whether a tensor is kept by value or in sums;
- ``hoist``: fixed maps move in front of layers that then have fewer positions;
- ``lower``: each layer is computed in the way that is fastest;
- ``derive``, when a program first runs: the reverse half is appended, word by word (``words``, on a
  ``tape``), and scales are put in; ``place`` lets the result run in given memory.

Three ways to use one of them by itself, which differ in what it is told and in nothing else:

- ``fold(module, setting)``, and so on: the pass itself; a setting is made from what :func:`capture`
  returns;
- ``Fold(setting)``, ``Lift``, ``Reduce`` (with ``hoist``), ``Lower``, ``Derive``: for torch's
  ``PassManager``, each of which checks the graph before and after (``managed``);
- ``fold_program(program)``, ..., ``derive_program`` of :mod:`fxpath.toolchain`: exported program
  in, exported program out, which knows its tensors by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from fxpath.capture import capture
from fxpath.errors import Problem, UnsupportedModelError
from fxpath.model import Captured, Given, Model
from fxpath.passes.advice import with_advice
from fxpath.passes.fold import fold
from fxpath.passes.hoist import hoist
from fxpath.passes.lift import lift
from fxpath.passes.lower import lower
from fxpath.passes.managed import Derive, Fold, Lift, Lower, Reduce
from fxpath.passes.reduce import reduce
from fxpath.passes.setting import Pass, Setting
from fxpath.sharding import refuse_sharded, whole

__all__ = [
    "Captured",
    "Derive",
    "Fold",
    "Given",
    "Lift",
    "Lower",
    "Pass",
    "Reduce",
    "Rewritten",
    "Setting",
    "capture",
    "fold",
    "hoist",
    "lift",
    "lower",
    "reduce",
    "rewrite",
    "take_in",
]


@dataclass(frozen=True)
class Rewritten:
    """A network after each pass.

    Attributes:
        lifted: as the rules write it, at full resolution, with activations and signs.
        reduced: the same after the spatial reduction, fixed maps where they cost least; ``lifted``
            itself without it.
        lowered: the graph that is run.
    """

    lifted: fx.GraphModule
    reduced: fx.GraphModule
    lowered: fx.GraphModule


def take_in(model: Model, given: Given, sharded: bool = False) -> tuple[Captured, fx.GraphModule]:
    """The first half, for whatever is read off the lifted graph: capture, fold, lift.

    Args:
        model: the model.
        given: what the caller says of its inputs and outputs.
        sharded: whether a model may have sharded parameters; what reads whole tensors refuses it.

    Raises:
        UnsupportedModelError: listing every operation without an exact rule, with the ``until=`` or
            ``outputs=`` that passes where there is one, and whether ``gates=True`` does.
        ValueError: for inputs that do not fit, an unknown ``until`` or ``outputs``.
    """
    if not sharded:
        refuse_sharded(model, "this function")
    captured = capture(model, given)
    setting = Setting(captured)
    folded = fold(captured.graph_module, setting)
    try:
        lifted = lift(folded, setting)
    except UnsupportedModelError as error:
        raise with_advice(error, model, given, captured, _passes, _problems) from error
    return _bound(captured, lifted), lifted


def rewrite(lifted: fx.GraphModule, setting: Setting, whole: bool = False) -> Rewritten:
    """The second half, to a graph that is run; ``whole`` leaves out the reduction."""
    reduced = lifted if whole else hoist(reduce(lifted, setting), setting)
    lowered = lower(reduced, setting)
    return Rewritten(lifted, reduced, lowered)


def _passes(model: Model, asked: Given) -> bool:
    """Whether a model is taken in if something else is asked for."""
    try:
        captured = capture(model, asked)
    except ValueError:
        return False
    return _problems(captured) == ()


def _problems(captured: Captured) -> tuple[Problem, ...] | None:
    """What stands in the way of a captured model; ``None`` if it has no output with paths."""
    try:
        lift(fold(captured.graph_module, Setting(captured)), Setting(captured))
    except UnsupportedModelError as error:
        return error.report.problems
    # A cut is a guess: its output may be none of floating point.
    except ValueError:
        return None
    return ()


def _bound(captured: Captured, lifted: fx.GraphModule) -> Captured:
    """A captured model that knows for which entries of its tensors the lifted graph was made."""
    names = [node.name for node in lifted.graph.nodes if node.meta.get("baked")]
    if not names:
        return captured
    live = captured.live()
    made_for = {captured.tensors[name]: whole(live[name].detach()).clone() for name in names}
    return replace(captured, baked={**made_for, **captured.baked})
