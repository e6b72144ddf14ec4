"""What a line of path-norms costs a training: steps with and without an evaluation.

`python -m benchmarks.callbacks`; weights and images are random.  Each loop runs with an evaluation
at every other step, so that a slow spell of the machine meets steps of both kinds; a step ends
where the callback is done.  The metric's reference are the weights at the start.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import (
    device,
    explained,
    load_module,
    options,
    positive,
    synchronize,
    write_json,
)
from fxpath.plugins.monitor import PathNormMonitor

__all__ = ["LOOPS", "main", "measure", "table"]

Shape = tuple[int, ...]


class Images(Dataset[dict[str, Tensor]]):
    """Random images with classes; after one batch they repeat."""

    def __init__(self, shape: Shape, batch: int, steps: int) -> None:
        self.inputs, self.count = torch.randn(batch, *shape), batch * steps

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self.inputs)
        return {"x": self.inputs[row], "labels": torch.tensor(row % 2)}


class Classifier(nn.Module):
    """What all loops train: a loss, and logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits by name."""
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Clock:
    """Seconds from the end of one step to that of the next."""

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step is done, with all that was asked of the device."""
        synchronize(self.where)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """The first step, in which memory is allocated, left out."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


# -- loops -----------------------------------------------------------------------------------------


def plain(net: nn.Module, images: Images, clock: Clock, metric: bool = True) -> None:
    """A loop of plain PyTorch."""
    model = Classifier(net).to(clock.where).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    monitor = PathNormMonitor(net, tuple(images.inputs.shape[1:]), every=2, metric=metric)
    for step, batch in enumerate(DataLoader(images, len(images.inputs)), 1):
        optimizer.zero_grad()
        model(**{key: value.to(clock.where) for key, value in batch.items()})["loss"].backward()
        optimizer.step()
        monitor.after_step(step)
        clock.tick()


def norm_only(net: nn.Module, images: Images, clock: Clock) -> None:
    """The same, without the metric to the last checkpoint."""
    plain(net, images, clock, metric=False)


def with_lightning(net: nn.Module, images: Images, clock: Clock) -> None:
    """Lightning's trainer."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers.logger import DummyLogger

    from fxpath.plugins.lightning import PathNormCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = Classifier(net)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.classifier(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    class Ticking(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.tick()

    shape = tuple(images.inputs.shape[1:])
    callback = PathNormCallback(shape, every=2, module="classifier.net")
    trainer = pl.Trainer(
        accelerator="cpu" if clock.where.type == "cpu" else "auto",
        devices=1,
        max_epochs=1,
        logger=DummyLogger(),
        callbacks=[callback, Ticking()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(images, len(images.inputs)))


def with_transformers(net: nn.Module, images: Images, clock: Clock) -> None:
    """Hugging Face's trainer."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from fxpath.plugins.transformers import PathNormCallback

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    callback = PathNormCallback(tuple(images.inputs.shape[1:]), every=2, module="net")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(images.inputs),
            num_train_epochs=1,
            optim="sgd",
            use_cpu=clock.where.type == "cpu",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(
            model=Classifier(net),
            args=arguments,
            train_dataset=images,
            callbacks=[callback, Ticking()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


#: What is timed, by name.
LOOPS: dict[str, Callable[[nn.Module, Images, Clock], None]] = {
    "plain": plain,
    "norm_only": norm_only,
    "lightning": with_lightning,
    "transformers": with_transformers,
}


# -- the table -------------------------------------------------------------------------------------


def measure(
    loop: str, net: nn.Module, images: Images, where: torch.device, every: int
) -> dict[str, Any]:
    """One row.

    Args:
        loop: among ``LOOPS``.
        net: maps images to logits; it is trained.
        images: of as many batches as there are steps.
        where: the device.
        every: steps from one evaluation to the next, of which the overhead is told.
    """
    clock = Clock(where)
    LOOPS[loop](net, images, clock)
    # The first time is that of the second step, which has an evaluation.
    measured, without = clock.seconds[0::2], clock.seconds[1::2]
    step, both = (1e3 * statistics.median(turns) for turns in (without, measured))
    evaluation = max(0.0, both / step - 1)
    return {
        "loop": loop,
        "step_ms": step,
        "step_with_evaluation_ms": both,
        "evaluation_in_steps": evaluation,
        "every": every,
        "overhead_percent": 100 * evaluation / every,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows.

    Example:
        >>> row = dict(loop="plain", step_ms=200.0, step_with_evaluation_ms=300.0,
        ...     evaluation_in_steps=0.5, every=50, overhead_percent=1.0)
        >>> table([row]).splitlines()[-1].split()
        ['plain', '200', '300', '0.50', '1.00']
    """
    headers = ["loop", "step (ms)", "with an evaluation (ms)", "evaluation / step"]
    headers.append(f"overhead at every {rows[0]['every']} (%)")
    keys = {"step_ms": 0, "step_with_evaluation_ms": 0, "evaluation_in_steps": 2}
    keys["overhead_percent"] = 2
    lines = [[row["loop"], *(f"{row[key]:.{d}f}" for key, d in keys.items())] for row in rows]
    align = ("left", *("right",) * 4)
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("callbacks", __doc__.split("\n")[0], repeats=7)
    parser.add_argument("--model", default="resnet18", metavar="MODEL")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--batch", type=positive, default=32, metavar="N")
    parser.add_argument("--size", type=positive, default=224, metavar="N", help="in pixels")
    parser.add_argument(
        "--every",
        type=positive,
        default=100,
        metavar="N",
        help="steps from one evaluation to the next (default %(default)s)",
    )
    parser.add_argument("--device", type=device, default="cpu", help="where the training runs")
    arguments = parser.parse_args(argv)
    shape = (3, arguments.size, arguments.size)
    rows = []
    for loop in arguments.loops:
        with explained(parser):
            net = load_module(arguments.model).train()
        images = Images(shape, arguments.batch, 2 * arguments.repeats + 1)
        rows.append(measure(loop, net, images, arguments.device, arguments.every))
        print(f"{loop} done", flush=True)
    print(f"\n{table(rows)}\n")
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
