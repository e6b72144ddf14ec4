"""The paper's Table 3: what pruning criteria cost, in multiples of a forward pass.

`python -m benchmarks.criteria`, or `fxpath bench`.  Weights are random.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxpath
from benchmarks.recipe import recipe
from benchmarks.timing import explained, fresh_process, interleave, load_module, options, write_json
from fxpath import criteria
from fxpath.capture.shapes import infer_input_shape
from fxpath.program.program import build

__all__ = ["break_even", "main", "measure", "table"]

MODELS = ("alexnet", "vgg16", "resnet18")
BATCH = 128
# OBD keeps all activations of a batch; it is linear in the loss, so that parts of it add up.
PART = 32
# One evaluation at the large batch size takes as long as all others together.
BATCH_REPEATS = 3

LABELS = {
    "forward_ms": "forward",
    "forward_b128_ms": "forward, batch 128",
    "magnitude_ms": "magnitude",
    "magnitude_out_ms": "magnitude, into buffers",
    "path_norm_ms": "path-norm, eager",
    "path_norm_compiled_ms": "path-norm, compiled",
    "path_magnitude_ms": "Path-Mag, eager",
    "path_magnitude_compiled_ms": "Path-Mag, compiled, into buffers",
    "obd_ms": "OBD",
    "obd_b128_ms": "OBD, batch 128",
    "recipe_f64_ms": "Path-Mag as published, float64",
    "recipe_f32_ms": "Path-Mag as published, float32",
}
# Its Path-Mag is the published recipe.
PAPER: dict[str, dict[str, float]] = {
    "alexnet": {
        "forward_ms": 1.7,
        "forward_b128_ms": 133,
        "magnitude_ms": 0.5,
        "obd_ms": 13,
        "obd_b128_ms": 60,
        "recipe_f64_ms": 14,
    },
    "vgg16": {
        "forward_ms": 2.3,
        "forward_b128_ms": 198,
        "magnitude_ms": 1.4,
        "obd_ms": 31,
        "obd_b128_ms": 675,
        "recipe_f64_ms": 61,
    },
    "resnet18": {
        "forward_ms": 3.6,
        "forward_b128_ms": 142,
        "magnitude_ms": 3.2,
        "obd_ms": 51,
        "obd_b128_ms": 155,
        "recipe_f64_ms": 32,
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("criteria", __doc__.split("\n")[0], repeats=15)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="MODEL", help="as for fxpath analyze"
    )
    parser.add_argument(
        "--full", action="store_true", help=f"forward and OBD at batch size {BATCH} too"
    )
    arguments = parser.parse_args(argv)
    rows = []
    with explained(parser):
        for name in arguments.models:
            rows.append(measure(name, arguments.repeats, arguments.full))
            print(f"\n{table(rows[-1])}\n", flush=True)
    if any(name in PAPER for name in arguments.models):
        print("paper: Table 3, measured on an NVIDIA A100\n")
    write_json(arguments.json, rows)
    return 0


def measure(name: str, repeats: int, full: bool = False) -> dict[str, Any]:
    """One row.

    Args:
        name: a MODEL, as on fxpath's command line, that classifies.
        repeats: turns of which the medians are taken.
        full: whether to add the large batch size.

    Raises:
        RuntimeError: if the recipe and fxpath disagree on a model that is within the recipe's
            reach: then something else is measured than meant.
    """
    model = load_module(name)
    shape = tuple(infer_input_shape(model))
    _check_recipe(name, model, shape)
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    row |= interleave(_cases(model, shape), repeats)
    if full:
        row |= interleave(_batch_cases(model, shape), min(BATCH_REPEATS, repeats))
    del model
    row["compile_cold_s"], row["compile_warm_s"] = _compile_seconds(name)
    return row


def _check_recipe(name: str, model: nn.Module, shape: tuple[int, ...]) -> None:
    """The baseline must compute the same number."""
    published = recipe(model, shape).path_norm
    error = abs(published / fxpath.path_norm(model, shape, dtype=torch.float64) - 1)
    print(f"{name}: published path-norm (float64) and fxpath's differ by {error:.1e}", flush=True)
    normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if not normalized and not error < 1e-9:
        raise RuntimeError(f"{name}: the published recipe's path-norm is off by {error:.1e}")


def _cases(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    batch = _batch(model, 1, shape)
    eager, compiled = build(model, shape), fxpath.compile(model, shape, backend="eager")
    sizes = criteria.magnitude(model)
    scores = {name: torch.empty_like(score) for name, score in eager.scores().items()}
    return {
        "forward_ms": lambda: _forward(model, batch[0]),
        "magnitude_ms": lambda: criteria.magnitude(model),
        "magnitude_out_ms": lambda: criteria.magnitude(model, out=sizes),
        "path_norm_ms": eager.path_norm,
        "path_norm_compiled_ms": compiled.path_norm,
        "path_magnitude_ms": eager.scores,
        "path_magnitude_compiled_ms": lambda: compiled.scores(out=scores),
        "obd_ms": lambda: criteria.obd(model, cross_entropy, batch),
        "recipe_f64_ms": lambda: recipe(model, shape, torch.float64),
        "recipe_f32_ms": lambda: recipe(model, shape, torch.float32),
    }


def _batch_cases(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    batch = _batch(model, BATCH, shape)
    return {
        f"forward_b{BATCH}_ms": lambda: _forward(model, batch[0]),
        f"obd_b{BATCH}_ms": lambda: _obd_in_parts(model, batch),
    }


def _batch(model: nn.Module, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random inputs, and random classes of the model's output."""
    inputs = torch.randn(count, *shape)
    classes = _forward(model, inputs[:1]).shape[1]
    return inputs, torch.randint(0, classes, (count,))


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


def _compile_seconds(name: str) -> tuple[float, float]:
    """Compilation with an empty cache, and with that cache filled."""
    with tempfile.TemporaryDirectory() as cache:
        (cold,), (warm,) = (
            fresh_process("benchmarks.compile_time", name, TORCHINDUCTOR_CACHE_DIR=cache)
            for _ in range(2)
        )
    return cold, warm


def break_even(row: Mapping[str, Any]) -> float:
    """Evaluations after which compiling has paid for itself; `inf` if it never does.

    Example:
        >>> break_even({"compile_cold_s": 9.0, "path_magnitude_ms": 40.0,
        ...             "path_magnitude_compiled_ms": 10.0})
        300.0
    """
    saved = row["path_magnitude_ms"] - row["path_magnitude_compiled_ms"]
    return 1e3 * row["compile_cold_s"] / saved if saved > 0 else float("inf")


def table(row: Mapping[str, Any]) -> str:
    """One model's table, and what compiling costs."""
    paper = PAPER.get(row["model"], {})
    lines = [
        [label, f"{row[key]:.1f}", f"{row[key] / row['forward_ms']:.2f}"]
        + ([f"{paper[key]:g}" if key in paper else ""] if paper else [])
        for key, label in LABELS.items()
        if key in row
    ]
    headers = [row["model"], "ms", "/ forward"] + (["paper, ms"] if paper else [])
    align = ("left", *("right",) * (len(headers) - 1))
    text = tabulate(lines, headers=headers, colalign=align, disable_numparse=True)
    evaluations = break_even(row)
    pays = f"after {evaluations:.0f} evaluations" if evaluations < float("inf") else "never"
    faster = row["recipe_f64_ms"] / row["path_magnitude_compiled_ms"]
    return (
        f"{text}\n{row['params']:,} parameters; published / compiled Path-Mag: {faster:.1f}\n"
        f"compiling takes {row['compile_cold_s']:.1f} s ({row['compile_warm_s']:.1f} s with a warm "
        f"cache), and pays {pays}"
    )


if __name__ == "__main__":
    sys.exit(main())
