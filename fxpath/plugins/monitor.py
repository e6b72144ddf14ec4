"""A line of numbers every n steps of a training, for a loop of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fxpath.model import Given, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.pairs.common import CommonPart, Effective
from fxpath.program.program import build

__all__ = ["LOWER", "NORM", "UPPER", "Log", "PathNormMonitor"]

#: Takes numbers by name, and the step that they belong to.
Log = Callable[[dict[str, float], int], object]

NORM = "fxpath/log10_path_norm"
LOWER, UPPER = (f"fxpath/relative_path_metric_{which}" for which in ("lower", "upper"))


class PathNormMonitor:
    """Path-norm of a model in training, and how far it is from the last checkpoint.

    The model is captured once; each evaluation reads its live weights and changes nothing: no
    gradient, mode, or random number.  What is measured, every ``every`` steps:

    - ``fxpath/log10_path_norm``: the decimal logarithm of ``||Phi(theta)||_1``, exact;
    - ``fxpath/relative_path_metric_lower`` and ``..._upper``: between these lies
      ``||Phi(theta) - Phi(theta')||_1 / ||Phi(theta')||_1``, with theta' the weights of the last
      checkpoint (until there is one, those at the start).  Between any two sets of weights this is
      not computable.  The lower bound is (6), ``| ||Phi(theta)|| - ||Phi(theta')|| |``; the upper
      one runs through the common part of both, the bound ``"m"`` of :class:`fxpath.PathMetric`.
      Both are the metric where weights only shrank, or only grew.

    Attributes:
        every: steps from one evaluation to the next.
        log: called with the numbers and their step.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lines = {}
        >>> monitor = PathNormMonitor(
        ...     model, every=2, log=lambda values, step: lines.update({step: values})
        ... )
        >>> for step in range(1, 5):
        ...     model(torch.ones(8, 2)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = monitor.after_step(step)
        >>> list(lines)
        [2, 4]
        >>> sorted(lines[4])[1:]
        ['fxpath/relative_path_metric_lower', 'fxpath/relative_path_metric_upper']
        >>> monitor.checkpoint()
        >>> monitor.measure()["fxpath/relative_path_metric_upper"]
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shapes = None,
        *,
        every: int = 100,
        log: Log | None = None,
        metric: bool = True,
        example_inputs: Inputs = None,
        example_kwargs: Mapping[str, Any] | None = None,
        batch_dim: int | None = 0,
        until: str | None = None,
        outputs: Outputs = None,
    ) -> None:
        """Capture a model, and evaluate it once: what is refused, is refused here.

        Args:
            model: as for :func:`fxpath.analyze`; also compiled, or wrapped for data parallelism.
            input_shape: as for :func:`fxpath.analyze`.
            every: steps from one evaluation to the next, >= 1.
            log: called with the numbers and their step; :meth:`after_step` returns them as well.
            metric: whether to measure the path-metric to the last checkpoint, which takes a copy of
                the weights, and much longer than the norm.
            example_inputs: as for :func:`fxpath.analyze`.
            example_kwargs: as for :func:`fxpath.analyze`.
            batch_dim: as for :func:`fxpath.analyze`.
            until: as for :func:`fxpath.analyze`.
            outputs: as for :func:`fxpath.analyze`.

        Raises:
            UnsupportedModelError: listing every operation that the theory does not cover.
            ValueError: as :func:`fxpath.analyze`; for ``every`` below 1; for slopes or clamp bounds
                that are trained, to whose weights before there is no path-metric.
            FloatingPointError: as :func:`fxpath.path_metric`.
        """
        if every < 1:
            raise ValueError(f"every={every}: pass a positive number of steps")
        self.every = every
        self.log = log
        given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
        self._program = build(model, given)
        self._common = CommonPart(self._program) if metric else None
        self._memory: Effective | None = None
        self._last: int | None = None
        trained = self._common.trained() if self._common else []
        if trained:
            raise ValueError(
                f"{', '.join(trained)}: slopes and clamp bounds are architecture, and a "
                "path-metric compares weights and biases of one architecture, but these are "
                "trained: pass metric=False for the path-norm alone, or freeze them "
                "(requires_grad_(False))"
            )
        self.checkpoint()
        self.measure()

    def checkpoint(self) -> None:
        """Take the weights as they are for those that the metric refers to.

        Raises:
            ValueError: naming what has changed, if the model is no longer what was captured.
        """
        if self._common is not None:
            live = self._program.captured.live()
            copied = {key: tensor.detach().clone() for key, tensor in live.items()}
            self._reference = self._common.evaluate(copied)

    def measure(self) -> dict[str, float]:
        """The numbers of the model as it is, by name.

        Raises:
            ValueError: for a NaN or infinite parameter, by name; naming what has changed, if the
                model is no longer what was captured; for slopes, clamp bounds or coefficients that
                are others than at the last checkpoint.
            FloatingPointError: as :func:`fxpath.path_metric`.
        """
        found = {NORM: self._program.log10_path_norm()}
        if self._common is not None:
            self._memory = self._common.evaluate(memory=self._memory)
            apart = self._common.apart(self._reference, self._memory)
            if apart.relative is None:
                raise ValueError(
                    "slopes, clamp bounds or fixed coefficients are not what they were at the last "
                    "checkpoint: they are architecture, and a path-metric compares weights and "
                    "biases of one architecture; call checkpoint() after they change, or pass "
                    "metric=False for the path-norm alone"
                )
            found[LOWER] = apart.relative if apart.exact else apart.relative_lower
            found[UPPER] = apart.relative
        return found

    def after_step(self, step: int) -> dict[str, float] | None:
        """Measure and log if ``step`` is a multiple of ``every``, and new.

        Args:
            step: number of the optimizer's steps until now, 1 after the first; may be told several
                times, as where gradients are accumulated.

        Returns:
            What :meth:`measure` returns, ``None`` at other steps.

        Raises:
            ValueError: as :meth:`measure`.
            FloatingPointError: as :meth:`measure`.
        """
        if step < 1 or step % self.every or step == self._last:
            return None
        self._last = step
        found = self.measure()
        if self.log is not None:
            self.log(found, step)
        return found
