"""A callback for Hugging Face's trainer that logs path-norms (extra ``transformers``)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxpath.plugins.monitor import Log, PathNormMonitor

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "a callback for transformers' trainer needs it: pip install 'torch-fxpath[transformers]'"
    ) from error

__all__ = ["PathNormCallback"]


class PathNormCallback(TrainerCallback):
    """Logs what :class:`~fxpath.plugins.monitor.PathNormMonitor` measures.

    The metric refers to the weights of the checkpoint that was saved last, before the first one to
    those at the start of the training.  The world's first process measures and logs alone.

    A trainer does not hand itself to its callbacks.  Without ``log`` the numbers go into
    ``trainer.state.log_history``; to reach TensorBoard and others, say how to log, as below.

    Example:
        >>> from transformers import Trainer
        >>> callback = PathNormCallback((3, 32, 32), log=lambda values, step: trainer.log(values))
        >>> callback.every
        100
    """

    def __init__(
        self,
        input_shape: Any = None,
        *,
        every: int = 100,
        log: Log | None = None,
        module: str = "",
        **options: Any,
    ) -> None:
        """Keep what is asked for; models are captured when a training begins.

        Args:
            input_shape: as for :func:`fxpath.analyze`.
            every: steps of the optimizer from one evaluation to the next.
            log: called with the numbers by name and the step.
            module: name of the submodule to measure; the trainer's model by default.
            options: those of :class:`~fxpath.plugins.monitor.PathNormMonitor`: ``metric``,
                ``example_kwargs``, ``outputs``, ...

        A training raises at its beginning what the monitor raises when it is made.
        """
        self.every = every
        self.log = log
        self.module = module
        self.options = {"input_shape": input_shape, **options}
        self.monitor: PathNormMonitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Capture the model, where it is to be trained."""
        if not state.is_world_process_zero:
            return
        model = _bare(kwargs["model"]).get_submodule(self.module)
        log = self.log or _recorded(state)
        self.monitor = PathNormMonitor(model, every=self.every, log=log, **self.options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is time to."""
        if self.monitor is not None:
            self.monitor.after_step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure from here on how far the weights are from these."""
        if self.monitor is not None:
            self.monitor.checkpoint()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the model and of the copy of its weights."""
        self.monitor = None


def _bare(model: nn.Module) -> nn.Module:
    """A model without the forward that accelerate puts in front of its own for mixed precision.

    That one cannot be copied, and rounds activations, which are no part of Phi.  What is returned
    has the same tensors and modules, also after they are exchanged.
    """
    original = vars(model).get("_original_forward")
    if getattr(original, "__func__", None) is not type(model).forward:
        return model
    bare = copy.copy(model)
    del vars(bare)["forward"]
    return bare


def _recorded(state: TrainerState) -> Log:
    def log(values: dict[str, float], step: int) -> None:
        state.log_history.append({**values, "epoch": state.epoch, "step": step})

    return log
