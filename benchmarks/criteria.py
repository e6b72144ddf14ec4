"""The paper's Table 3: what pruning criteria cost, in multiples of a forward pass.

`python -m benchmarks.criteria`.  Weights are random.  One program is measured at
a time, with a forward pass between any two runs, as each takes the caches from the other; ratios
are those of the medians of the two.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxpath
from benchmarks.columns import COLUMNS, deviation, expected, offered
from benchmarks.recipe import recipe
from benchmarks.timing import (
    CPU,
    device,
    explained,
    fresh_process,
    interleave,
    load_module,
    options,
    synchronize,
    write_json,
)
from fxpath import criteria
from fxpath.capture.shapes import infer_input_shape

__all__ = ["break_even", "main", "measure", "table"]

MODELS = ("alexnet", "vgg16", "resnet18")
BATCH = 128
# OBD keeps all activations of a batch; it is linear in the loss, so that parts of it add up.
PART = 32
# One evaluation at the large batch size takes as long as all others together.
BATCH_REPEATS = 3

# Beyond it, something else is measured than meant; TF32 on a GPU costs some 1e-3.
TOLERANCE = 0.02

WHAT = {"path_norm": "path-norm", "path_magnitude": "Path-Mag"}
LABELS = {
    "forward": "forward",
    "forward_b128": "forward, batch 128",
    "magnitude": "magnitude",
    "magnitude_out": "magnitude, into given tensors",
    **{
        f"{what}_{column}": f"{label}, {way}"
        for what, label in WHAT.items()
        for column, (way, _) in COLUMNS.items()
    },
    "obd": "OBD",
    "obd_b128": "OBD, batch 128",
    "recipe_f64": "Path-Mag as published, float64",
    "recipe_f32": "Path-Mag as published, float32",
}
# Its Path-Mag is the published recipe.
PAPER: dict[str, dict[str, float]] = {
    "alexnet": {
        "forward": 1.7,
        "forward_b128": 133,
        "magnitude": 0.5,
        "obd": 13,
        "obd_b128": 60,
        "recipe_f64": 14,
    },
    "vgg16": {
        "forward": 2.3,
        "forward_b128": 198,
        "magnitude": 1.4,
        "obd": 31,
        "obd_b128": 675,
        "recipe_f64": 61,
    },
    "resnet18": {
        "forward": 3.6,
        "forward_b128": 142,
        "magnitude": 3.2,
        "obd": 51,
        "obd_b128": 155,
        "recipe_f64": 32,
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("criteria", __doc__.split("\n")[0], repeats=15)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="MODEL", help="as for fxpath analyze"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        metavar="COLUMN",
        help=f"what runs fxpath's programs: {', '.join(COLUMNS)} (default: all that the device "
        "can; aotinductor and onnx take minutes to compile)",
    )
    parser.add_argument(
        "--device", type=device, default="cpu", help="what to measure on (default %(default)s)"
    )
    parser.add_argument(
        "--full", action="store_true", help=f"forward and OBD at batch size {BATCH} too"
    )
    arguments = parser.parse_args(argv)
    where, columns = arguments.device, arguments.columns
    if columns and not set(columns) <= set(offered(where)):
        parser.error("cudagraph needs --device cuda")
    rows = []
    with explained(parser):
        for name in arguments.models:
            rows.append(measure(name, arguments.repeats, arguments.full, columns, where))
            print(f"\n{table(rows[-1])}\n", flush=True)
    if any(name in PAPER for name in arguments.models):
        print("paper: Table 3, measured on an NVIDIA A100\n")
    write_json(arguments.json, rows)
    return 0


def measure(
    name: str,
    repeats: int,
    full: bool = False,
    columns: Sequence[str] | None = None,
    where: torch.device = CPU,
) -> dict[str, Any]:
    """One row: milliseconds, and multiples of the forward passes that were timed in between.

    Args:
        name: a MODEL, as on fxpath's command line, that classifies.
        repeats: turns of which the medians are taken.
        full: whether to add the large batch size.
        columns: what runs fxpath's programs; all that the device can by default.
        where: what to measure on.

    Raises:
        RuntimeError: if the recipe and fxpath disagree on a model that is within the recipe's
            reach: then something else is measured than meant.
    """
    row = _timed(name, repeats, full, columns or offered(where), where)
    # The model is gone by now: these processes need the memory.
    return row | _compile_seconds(name, where) if "path_magnitude_inductor_ms" in row else row


def _timed(
    name: str, repeats: int, full: bool, columns: Sequence[str], where: torch.device
) -> dict[str, Any]:
    model = load_module(name)
    shape = tuple(infer_input_shape(model))
    model.to(where)
    _check_recipe(name, model, shape)
    row: dict[str, Any] = {
        "model": name,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "params": sum(p.numel() for p in model.parameters()),
        "left_out": {},
    }
    batch = _batch(model, 1, shape)
    clock = _Clock(row, lambda: _forward(model, batch[0]), repeats, where)
    for key, case in _baselines(model, shape, batch).items():
        clock.time(key, case)
    _time_columns(clock, model, shape, columns)
    if full:
        large = _batch(model, BATCH, shape)
        clock.repeats = min(BATCH_REPEATS, repeats)
        clock.time(f"forward_b{BATCH}", lambda: _forward(model, large[0]))
        clock.time(f"obd_b{BATCH}", lambda: _obd_in_parts(model, large))
    row["forward_ms"] = statistics.median(clock.forwards)
    row["forward_ratio"] = 1.0
    return row


@dataclass
class _Clock:
    """Times one case after the other, a forward pass between any two runs of it."""

    row: dict[str, Any]
    forward: Callable[[], object]
    repeats: int
    where: torch.device
    forwards: list[float] = field(default_factory=list)

    def time(self, key: str, case: Callable[[], object]) -> None:
        cases = {"forward": self.forward, "case": case}
        medians = interleave(cases, self.repeats, self.where)
        self.forwards.append(medians["forward"])
        self.row[f"{key}_ms"] = medians["case"]
        self.row[f"{key}_ratio"] = medians["case"] / medians["forward"]


def _time_columns(
    clock: _Clock, model: nn.Module, shape: tuple[int, ...], columns: Sequence[str]
) -> None:
    """Add what each column can; a line says why where one cannot."""
    right = expected(model, shape)
    for column in columns:
        for what in WHAT:
            key = f"{what}_{column}"
            try:
                start = time.perf_counter()
                way = COLUMNS[column][1](model, shape, what == "path_magnitude")
                way.run()
                synchronize(clock.where)
                ready = time.perf_counter() - start
                apart = deviation(way.found(), right)
                if not apart < TOLERANCE:
                    raise RuntimeError(f"it is off by {apart:.1e}")
                clock.time(key, way.run)
            except Exception as error:  # one column is no reason to lose the others
                line = f"{type(error).__name__}: {error}".split("\n")[0]
                clock.row["left_out"][key] = line
                print(f"{LABELS[key]}: left out: {line}", flush=True)
                continue
            clock.row |= {f"{key}_ready_s": ready, f"{key}_deviation": apart}
            print(
                f"{LABELS[key]}: ready after {ready:.1f} s, {clock.row[f'{key}_ms']:.1f} ms, "
                f"deviates from float64 by {apart:.1e}",
                flush=True,
            )


def _check_recipe(name: str, model: nn.Module, shape: tuple[int, ...]) -> None:
    """The baseline must compute the same number."""
    published = recipe(model, shape).path_norm
    error = abs(published / fxpath.path_norm(model, shape, dtype=torch.float64) - 1)
    print(f"{name}: published path-norm (float64) and fxpath's differ by {error:.1e}", flush=True)
    normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if not normalized and not error < 1e-9:
        raise RuntimeError(f"{name}: the published recipe's path-norm is off by {error:.1e}")


def _baselines(
    model: nn.Module, shape: tuple[int, ...], batch: tuple[Tensor, Tensor]
) -> dict[str, Callable[[], object]]:
    sizes = criteria.magnitude(model)
    return {
        "magnitude": lambda: criteria.magnitude(model),
        "magnitude_out": lambda: criteria.magnitude(model, out=sizes),
        "obd": lambda: criteria.obd(model, cross_entropy, batch),
        "recipe_f64": lambda: recipe(model, shape, torch.float64),
        "recipe_f32": lambda: recipe(model, shape, torch.float32),
    }


def _batch(model: nn.Module, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random inputs, and random classes of the model's output."""
    where = next(model.parameters()).device
    inputs = torch.randn(count, *shape, device=where)
    classes = _forward(model, inputs[:1]).shape[1]
    return inputs, torch.randint(0, classes, (count,), device=where)


def _forward(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(inputs)
    return output


def _obd_in_parts(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """OBD of a batch whose activations do not fit into memory at once."""
    total: dict[str, Tensor] = {}
    for inputs, targets in zip(*(part.split(PART) for part in batch), strict=True):
        scores = criteria.obd(model, _sum_of_losses, (inputs, targets))
        total = {n: total[n].add_(s) for n, s in scores.items()} if total else scores
    return total


def _sum_of_losses(output: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(output, targets, reduction="sum")


def _compile_seconds(name: str, where: torch.device) -> dict[str, float]:
    """Compilation with an empty cache, and in a second process with that cache filled."""
    with tempfile.TemporaryDirectory() as cache:
        (capture, cold), (_, warm) = (
            fresh_process(
                "benchmarks.compile_time", name, str(where), TORCHINDUCTOR_CACHE_DIR=cache
            )
            for _ in range(2)
        )
    return {"capture_s": capture, "compile_cold_s": cold, "compile_warm_s": warm}


def break_even(row: Mapping[str, Any], cache: str = "cold") -> float:
    """Evaluations after which compiling has paid for itself; `inf` if it never does.

    Args:
        row: of :func:`measure`.
        cache: `cold` or `warm`.

    Example:
        >>> break_even({"compile_cold_s": 9.0, "path_magnitude_eager_ms": 40.0,
        ...             "path_magnitude_inductor_ms": 10.0})
        300.0
    """
    saved = row["path_magnitude_eager_ms"] - row["path_magnitude_inductor_ms"]
    return 1e3 * row[f"compile_{cache}_s"] / saved if saved > 0 else float("inf")


def table(row: Mapping[str, Any]) -> str:
    """One model's table, and what compiling costs."""
    paper = PAPER.get(row["model"], {})
    lines = [
        [label, f"{row[f'{key}_ms']:.1f}", f"{row[f'{key}_ratio']:.2f}"]
        + ([f"{paper[key]:g}" if key in paper else ""] if paper else [])
        for key, label in LABELS.items()
        if f"{key}_ms" in row
    ]
    headers = [row["model"], "ms", "/ forward"] + (["paper, ms"] if paper else [])
    align = ("left", *("right",) * (len(headers) - 1))
    text = tabulate(lines, headers=headers, colalign=align, disable_numparse=True)
    text += f"\n{row['params']:,} parameters; {row['device']}"
    if "compile_cold_s" not in row:
        return text
    text += (
        f"\nInductor compiles Path-Mag in {row['compile_cold_s']:.1f} s "
        f"({row['compile_warm_s']:.1f} s with a warm cache)"
    )
    if "path_magnitude_eager_ms" not in row:
        return text
    cold, warm = break_even(row), break_even(row, "warm")
    if cold == float("inf"):
        return f"{text}, and never pays against eager"
    return f"{text}, and pays against eager after {cold:.0f} ({warm:.0f}) evaluations"


if __name__ == "__main__":
    sys.exit(main())
