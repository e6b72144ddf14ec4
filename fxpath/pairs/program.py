"""MetricProgram: a model captured once, between whose weights path-metrics are taken many times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fxpath.modes import plain_mode
from fxpath.pairs.matching import side_of
from fxpath.pairs.metric import PathMetric
from fxpath.pairs.pair import Pair
from fxpath.passes.reduce import reduce
from fxpath.passes.setting import Setting
from fxpath.program.program import PathProgram

#: Tensors of a model by placeholder of its captured graph, as ``Captured.live()`` has them.
Tensors = Mapping[str, Tensor]


class MetricProgram:
    """Path-metrics between sets of weights of one model, whose graph is rewritten once.

    Attributes:
        program: the model's program; what it was made for is watched.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> metrics = MetricProgram(fxpath.compile(model, backend="eager"))
        >>> before = metrics.copied()
        >>> _ = model.weight.data.mul_(0.5)
        >>> metrics.metric(before).value
        3.0
    """

    def __init__(self, program: PathProgram) -> None:
        """Prepare path-metrics for the model of ``program``."""
        self.program = program
        with plain_mode():
            self._reduced = reduce(program.lifted, Setting(program.captured))

    @plain_mode()
    def copied(self) -> dict[str, Tensor]:
        """A copy of the tensors that the model's graph reads, as they are now.

        Raises:
            ValueError: if what the graph was made for has changed.
        """
        live = self.program.captured.live()
        return {key: tensor.detach().clone() for key, tensor in live.items()}

    def trained(self) -> list[str]:
        """Parameters with a gradient that are no part of theta, by name: slopes and clamp bounds.

        Training changes them, and with them what two sets of weights have to have in common.
        """
        live = self.program.captured.live()
        side = side_of(self.program.captured, self.program.lifted)
        pair, names = Pair(side.module, side, side), self.program.captured.tensors
        learnt = {names[key] for key, tensor in live.items() if tensor.requires_grad}
        fixed = [name for node in side.nodes if node.meta["fixed"] for name in pair.names(node)]
        return [name for name in dict.fromkeys(fixed) if name in learnt]

    @plain_mode()
    def metric(self, first: Tensors, second: Tensors | None = None) -> PathMetric:
        """The path-metric from one set of weights to another: :func:`fxpath.path_metric`.

        Args:
            first: the set whose path-norm is what relative numbers refer to.
            second: the other one; the model's own weights by default.

        Raises:
            ValueError: if what the graph was made for has changed, slopes or clamp bounds differ,
                or an effective weight is NaN or infinite.
            FloatingPointError: if a neuron's path-norm is not within 1e-270 ... 1e300.
        """
        live = side_of(self.program.captured, self.program.lifted)
        other = live if second is None else replace(live, tensors=second)
        pair = Pair(self.program.lifted, replace(live, tensors=first), other).remember()
        pair.check_architecture()
        return PathMetric(pair, self._reduced)
