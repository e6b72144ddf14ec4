"""A callback for Lightning's trainer that logs path-norms (extra ``lightning``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxpath.plugins.monitor import PathNormMonitor

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule
    except ImportError:
        try:
            from pytorch_lightning import Callback, LightningModule
        except ImportError as error:
            raise ImportError(
                "a callback for Lightning needs it: pip install 'torch-fxpath[lightning]'"
            ) from error

__all__ = ["PathNormCallback"]


class PathNormCallback(Callback):
    """Logs what :class:`~fxpath.plugins.monitor.PathNormMonitor` measures, to all loggers.

    The metric refers to the weights of the checkpoint that was saved last, before the first one to
    those at the start of the fit.  Under data parallelism rank 0 measures and logs alone, and the
    others wait for it at their next step.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = PathNormCallback((3, 32, 32), every=50, module="net")
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False)
    """

    def __init__(
        self, input_shape: Any = None, *, every: int = 100, module: str = "", **options: Any
    ) -> None:
        """Keep what is asked for; models are captured when a fit starts.

        Args:
            input_shape: as for :func:`fxpath.analyze`.
            every: steps of the optimizer from one evaluation to the next.
            module: name of the submodule to measure, as in ``self.net`` of a LightningModule
                without a ``forward``; the LightningModule itself by default.
            options: those of :class:`~fxpath.plugins.monitor.PathNormMonitor`: ``metric``,
                ``example_inputs``, ``until``, ...

        A fit raises at its start, before the first batch, what the monitor raises when it is made;
        and a ``ValueError`` if the trainer has no logger, or the module no ``forward``.
        """
        self.module = module
        self.options = {"input_shape": input_shape, "every": every, **options}
        self.monitor: PathNormMonitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Capture the module, where it is to be trained."""
        if not trainer.is_global_zero:
            return
        if not trainer.loggers:
            raise ValueError(
                "the trainer has no logger to log path-norms to: pass one, or drop this callback"
            )
        model = pl_module.get_submodule(self.module)
        if type(model).forward is LightningModule.forward:
            raise ValueError(
                f"{type(model).__name__} has no forward to capture: name the submodule to measure, "
                "as in PathNormCallback(module='net')"
            )
        self.monitor = PathNormMonitor(model, log=_logged(trainer), **self.options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if it is time to."""
        if self.monitor is not None:
            self.monitor.after_step(trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Measure from here on how far the weights are from these."""
        if self.monitor is not None:
            self.monitor.checkpoint()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model and of the copy of its weights."""
        self.monitor = None


def _logged(trainer: Trainer) -> Any:
    def log(values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    return log
