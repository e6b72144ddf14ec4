"""The logarithm of the path-norm in a training loss: what it costs, and what it does.

`python -m benchmarks.training` prints two tables.  *Digits*: a small ResNet with batch norms on the
digits of scikit-learn, with and without ``log_path_norm`` in the loss, over several seeds.  *Step*:
one step of larger networks with and without it, taking turns; peak memory in a process for each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import fxpath
from benchmarks.memory import peak_bytes
from benchmarks.tasks import TASKS
from benchmarks.timing import (
    explained,
    fresh_process,
    interleave,
    load_module,
    options,
    positive,
    write_json,
)
from fxpath.capture.shapes import infer_input_shape

__all__ = ["digits", "main", "step_of", "steps"]

#: How the penalty is computed: not at all, or by the backend of that name.
WAYS = ("plain", "eager", "inductor")

BATCH = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("training", __doc__.split("\n")[0], repeats=5)
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="of the digits")
    parser.add_argument("--epochs", type=positive, default=10, metavar="N", help="of the digits")
    parser.add_argument(
        "--weight", type=float, default=1e-2, metavar="W", help="of the penalty in the loss"
    )
    parser.add_argument(
        "--models", nargs="*", default=["resnet18"], metavar="MODEL", help="whose step is timed"
    )
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="of that step")
    parser.add_argument(
        "--here", choices=WAYS, help="do one step of one MODEL, and print how many bytes it took"
    )
    arguments = parser.parse_args(argv)
    with explained(parser):
        if arguments.here:
            print(_bytes(arguments.models[0], arguments.here, arguments.batch))
            return 0
        rows = digits(arguments.seeds, arguments.epochs, arguments.weight)
        print(f"{_digits_table(rows)}\n", flush=True)
        timed = [steps(name, arguments.batch, arguments.repeats) for name in arguments.models]
    print(f"{_steps_table(timed)}\n")
    write_json(arguments.json, [*rows, *timed])
    return 0


# -- digits ----------------------------------------------------------------------------------------


def digits(seeds: int, epochs: int, weight: float) -> list[dict[str, Any]]:
    """Accuracy, path-norm and penalty after training, for each seed without and with the term."""
    rows = []
    for seed in range(seeds):
        for factor in (0.0, weight):
            torch.manual_seed(seed)
            model = TASKS["digits"].network()
            accuracy = _trained(model, epochs, factor, seed)
            norm = fxpath.analyze(model, (1, 8, 8)).log10_path_norm
            rescaled = fxpath.rescale(model, (1, 8, 8), choices=(0.3, 1, 5), seed=seed)
            penalties = [
                float(fxpath.compile(each, (1, 8, 8), backend="eager").log_path_norm().detach())
                for each in (model, rescaled)
            ]
            row = {"seed": seed, "weight": factor, "accuracy": accuracy, "log10_path_norm": norm}
            row |= {"penalty": penalties[0], "penalty_rescaled": penalties[1]}
            row |= {"decay": _squares(model), "decay_rescaled": _squares(rescaled)}
            rows.append(row)
    return rows


def _trained(model: nn.Module, epochs: int, weight: float, seed: int) -> float:
    """Train a network, and return its accuracy on what it has not seen."""
    data = TASKS["digits"].data()
    program = fxpath.compile(model, (1, 8, 8), backend="inductor" if weight else "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    count = len(data.train_inputs) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_inputs), generator=generator)
        for picked in order.split(BATCH)[:count]:
            loss = F.cross_entropy(model(data.train_inputs[picked]), data.train_classes[picked])
            if weight:
                loss = loss + weight * program.log_path_norm()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(data.test_inputs).argmax(1) == data.test_classes
    return float(right.double().mean())


def _squares(model: nn.Module) -> float:
    """What weight decay would take for a penalty."""
    return float(sum(p.detach().double().square().sum() for p in model.parameters()))


def _digits_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for weight in sorted({row["weight"] for row in rows}):
        group = [row for row in rows if row["weight"] == weight]
        accuracies, norms = ([row[k] for row in group] for k in ("accuracy", "log10_path_norm"))
        changes = [
            max(abs(row[f"{what}_rescaled"] / row[what] - 1) for row in group)
            for what in ("penalty", "decay")
        ]
        lines.append(
            [
                f"{weight:g}",
                f"{100 * statistics.mean(accuracies):.2f} ± {100 * _deviation(accuracies):.2f}",
                f"{statistics.mean(norms):.3f} ± {_deviation(norms):.3f}",
                *(f"{change:.1e}" for change in changes),
            ]
        )
    headers = ["weight of log ‖Φ‖₁", "accuracy, %", "log10 ‖Φ‖₁"]
    headers += ["log ‖Φ‖₁ rescaled", "sum of squares rescaled"]
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("right",) * 5)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# -- one step --------------------------------------------------------------------------------------


def step_of(name: str, way: str, batch: int) -> Callable[[], None]:
    """One step of training: forward, backward, update."""
    model = load_module(name)
    shape = tuple(infer_input_shape(model))
    program = None if way == "plain" else fxpath.compile(model, shape, backend=way)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    inputs = torch.randn(batch, *shape)

    def step() -> None:
        outputs = model(inputs)
        loss: Tensor = F.cross_entropy(outputs, torch.zeros(batch, dtype=torch.int64))
        if program is not None:
            loss = loss + 1e-2 * program.log_path_norm()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step each way, and the peak memory that it takes beyond torch's own."""
    medians = interleave({way: step_of(name, way, batch) for way in WAYS}, repeats)
    row: dict[str, Any] = {"model": name, "batch": batch}
    row |= {f"{way}_ms": medians[way] for way in WAYS}
    row |= {f"{way}_ratio": medians[way] / medians["plain"] for way in WAYS[1:]}
    command = "--models", name, "--batch", str(batch)
    for way in WAYS:
        row[f"{way}_bytes"] = int(fresh_process("benchmarks.training", "--here", way, *command)[0])
    return row


def _bytes(name: str, way: str, batch: int) -> int:
    before = peak_bytes()
    step = step_of(name, way, batch)
    for _ in range(2):  # the optimizer's memory begins at the end of the first
        step()
    return peak_bytes() - before


def _steps_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            f"{row['model']}, batch {row['batch']}",
            *(f"{row[f'{way}_ms']:.0f}" for way in WAYS),
            *(f"{row[f'{way}_ratio']:.3f}" for way in WAYS[1:]),
            *(f"{row[f'{way}_bytes'] / 1e6:.0f}" for way in WAYS),
        ]
        for row in rows
    ]
    headers = ["step of", "plain, ms", "penalty, eager", "penalty, Inductor"]
    headers += ["eager / plain", "Inductor / plain", "MB plain", "MB eager", "MB Inductor"]
    return tabulate(
        lines, headers=headers, disable_numparse=True, colalign=("left", *("right",) * 8)
    )


if __name__ == "__main__":
    sys.exit(main())
