"""The passes as torch's ``PassManager`` runs them: graph module in, :class:`PassResult` out.

    >>> import torch
    >>> from torch.fx.passes.infra.pass_manager import PassManager
    >>> from fxpath.passes import Derive, Fold, Given, Lift, Lower, Reduce, Setting, capture
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, -3.0)
    >>> setting = Setting(capture(model, Given((2,))))
    >>> manager = PassManager([step(setting) for step in (Fold, Lift, Reduce, Lower, Derive)])
    >>> derived = manager(setting.captured.graph_module).graph_module
    >>> with torch.no_grad():
    ...     found = derived(*setting.captured.live().values())
    >>> float(found["mantissa"] * 2 ** found["exponent"]), found["scores"]["weight"].tolist()
    (6.0, [[0.5, 0.5]])

None changes the graph that it is given, and each is for one captured model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxpath.graph.spec import violations
from fxpath.passes.derive import Ending, derive
from fxpath.passes.fold import fold
from fxpath.passes.hoist import hoist
from fxpath.passes.lift import lift
from fxpath.passes.lower import lower
from fxpath.passes.reduce import reduce
from fxpath.passes.setting import Setting

__all__ = ["Derive", "Fold", "Lift", "Lower", "Reduce"]


class _Managed(PassBase):
    """A pass, and the stages of :mod:`fxpath.graph.spec` before and after it.

    Attributes:
        setting: the model as captured, and the exponent.
        before: the graph that it is given is at one of these stages.
        after: the one that it returns is at this stage.
    """

    before: ClassVar[tuple[str, ...]]
    after: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check, rewrite a copy, and check that, which torch's own base does not look at.

        Raises:
            ValueError: if the graph is at another stage, or the result does not hold to its own.
            UnsupportedModelError: by :class:`Lift`, listing every operation without an exact rule.
        """
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a copy of a graph; the graph itself is not changed."""
        made = self.rewritten(graph_module)
        return PassResult(made, str(made.graph) != str(graph_module.graph))

    def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The graph after the pass."""
        raise NotImplementedError

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that a graph is at a stage at which the pass runs.

        Raises:
            ValueError: naming the stages, and what does not hold.
        """
        found = ""
        for stage in self.before:
            wrong = violations(graph_module, stage, self.setting.captured)
            if not wrong:
                return
            found = found or wrong[0]
        raise ValueError(
            f"{type(self).__name__} takes a {' or '.join(self.before)} graph, and in this one "
            f"{found}"
        )

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that a graph is what the pass promises.

        Raises:
            ValueError: naming all that does not hold.
        """
        wrong = violations(graph_module, self.after, self.setting.captured)
        if wrong:
            raise ValueError(f"this is no {self.after} graph: {'; '.join(wrong)}")


class Fold(_Managed):
    """Frozen batch norms become part of the maps before them: see :mod:`fxpath.passes.fold`.

    Takes the graph of the captured model, ``setting.captured.graph_module``.
    """

    before, after = ("captured",), "folded"

    def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The folded graph."""
        return fold(graph_module, self.setting)


class Lift(_Managed):
    """ATen becomes the vocabulary of :mod:`fxpath.graph.ops`: see :mod:`fxpath.passes.lift`."""

    before, after = ("folded",), "lifted"

    def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The lifted graph."""
        return lift(graph_module, self.setting)


class Reduce(_Managed):
    """Equal positions are kept once, fixed maps where they cost least.

    See :mod:`fxpath.passes.reduce` and :mod:`fxpath.passes.hoist`, which are one step here.  It can
    be left out: the norm and the scores are the same.
    """

    before, after = ("lifted",), "reduced"

    def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The reduced graph."""
        return hoist(reduce(graph_module, self.setting), self.setting)


class Lower(_Managed):
    """Each layer is computed in the way that is fastest: see :mod:`fxpath.passes.lower`."""

    before, after = ("lifted", "reduced"), "lowered"

    def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The lowered graph."""
        return lower(graph_module, self.setting)


class Derive(_Managed):
    """The reverse half and the scales are put in: see :mod:`fxpath.passes.derive`.

    What comes out takes the model's tensors, and returns a dictionary of tensors, which that module
    describes: the norm as a mantissa and an exponent, the scores, and the witnesses of range.
    """

    before, after = ("lowered",), "derived"

    def __init__(
        self, setting: Setting, dtype: torch.dtype = torch.float64, ending: Ending = "scores"
    ) -> None:
        """Choose the number format, and what is computed beside the norm."""
        super().__init__(setting)
        self.dtype, self.ending = dtype, ending

    def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The derived graph."""
        return derive(graph_module, self.setting, self.dtype, self.ending)
