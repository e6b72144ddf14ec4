"""Certified bounds against the largest difference found, and what rescaling does to both.

`python -m benchmarks.bounds`.  For each network and each change of its weights (magnitude pruning,
quantization) it sets bounds of the change of the outputs, for inputs in [-1, 1], beside the largest
change that random inputs and gradient ascent find.  Then both networks are rescaled at random, each
in its own way (Appendix D): the functions stay, and so do the path-metric and invariant bounds.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torchvision
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import fxpath
from benchmarks.timing import options, write_json
from fxpath import criteria
from fxpath.graph.realization import realization
from fxpath.model import Given
from fxpath.pairs.attack import largest_difference
from fxpath.pairs.matching import make_pair
from fxpath.pairs.rivals import find_layered

__all__ = ["CHANGES", "MODELS", "main", "measure", "prepare", "table"]

Shape = tuple[int, ...]


def mlp() -> nn.Module:
    """Three layers without biases, the class that (2), (9) and (29) know."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 32, bias=False),
        nn.ReLU(),
        nn.Linear(32, 32, bias=False),
        nn.ReLU(),
        nn.Linear(32, 10, bias=False),
    )


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max-pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def resnet18() -> nn.Module:
    """ResNet-18 with ten classes."""
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    return model


#: Name -> constructor, input shape, epochs of training, and of the search for a large difference
#: the number of starts and of steps.
MODELS: dict[str, tuple[Callable[[], nn.Module], Shape, int, tuple[int, int]]] = {
    "mlp": (mlp, (1, 8, 8), 40, (32, 40)),
    "lenet": (lenet, (1, 28, 28), 8, (32, 40)),
    "resnet18": (resnet18, (3, 32, 32), 3, (8, 15)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("bounds", __doc__.split("\n")[0], repeats=None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=("random", "digits"), default=WEIGHTS)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for weights in arguments.weights:
            model, accuracy = prepare(name, weights)
            print(f"\n{name}, {weights} weights: accuracy on digits {accuracy:.3f}", flush=True)
            found = list(measure(name, weights, model, arguments.changes))
            rows += found
            print(table(found), flush=True)
    write_json(arguments.json, rows)
    return 0


# -- networks --------------------------------------------------------------------------------------

WEIGHTS = ("random", "digits")


def prepare(name: str, weights: str) -> tuple[nn.Module, float]:
    """A network with random weights, or trained on scikit-learn's digits.

    Returns:
        The network in eval mode, float32, and its accuracy on the last quarter of the digits.
    """
    make, shape, epochs, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        images, classes = _digits(shape)
        count = 3 * len(images) // 4
        if weights == "digits":
            _train(model, images[:count], classes[:count], epochs)
    model.eval()
    with torch.no_grad():
        hits = model(images[count:]).argmax(1) == classes[count:]
    return model, hits.float().mean().item()


def _digits(shape: Shape) -> tuple[Tensor, Tensor]:
    """All digits in [-1, 1], enlarged to a shape."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = interpolate(images, shape[1:], mode="nearest").expand(-1, shape[0], -1, -1)
    return large.contiguous(), torch.tensor(data.target)


def _train(model: nn.Module, images: Tensor, classes: Tensor, epochs: int) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()


# -- changes ---------------------------------------------------------------------------------------


def _pruned(amount: float) -> Callable[[nn.Module, Shape], nn.Module]:
    """The weights of smallest size set to zero: a fraction of all; the largest one for 1."""

    def change(model: nn.Module, shape: Shape) -> nn.Module:
        scores = criteria.magnitude(model)
        flat = torch.cat([score.flatten() for score in scores.values()])
        # One weight alone: the largest, as the smallest of all changes next to nothing.
        order = flat.argsort()
        chosen = order[-1:] if amount == 1 else order[: round(amount * len(flat))]
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[chosen] = True
        other = copy.deepcopy(model)
        for name, part in zip(
            scores, mask.split([s.numel() for s in scores.values()]), strict=True
        ):
            parameter = other.get_parameter(name)
            parameter.data[part.view_as(parameter)] = 0
        return other

    return change


def _quantized(bits: int, rounding: str) -> Callable[[nn.Module, Shape], nn.Module]:
    def change(model: nn.Module, shape: Shape) -> nn.Module:
        other = copy.deepcopy(model)
        quantized = fxpath.quantize(model, bits, rounding=rounding, input_shape=shape)
        other.load_state_dict(quantized.state_dict)
        return other

    return change


#: Name on the command line -> the change.
CHANGES: dict[str, Callable[[nn.Module, Shape], nn.Module]] = {
    "prune-1": _pruned(1),
    "prune-1%": _pruned(0.01),
    "prune-10%": _pruned(0.1),
    "prune-50%": _pruned(0.5),
    "8-bit-zero": _quantized(8, "zero"),
    "8-bit": _quantized(8, "nearest"),
    "6-bit": _quantized(6, "nearest"),
    "4-bit": _quantized(4, "nearest"),
    "2-bit": _quantized(2, "nearest"),
}


# -- measuring -------------------------------------------------------------------------------------


def measure(
    name: str, weights: str, model: nn.Module, changes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Two rows for each change: as it is, and after a random rescaling of both networks.

    Args:
        name: of the network, among ``MODELS``.
        weights: what they are, for the record.
        model: the network.
        changes: names among ``CHANGES``.
    """
    _, shape, _, search = MODELS[name]
    for change in changes:
        other = CHANGES[change](model, shape)
        rescaled = fxpath.rescale(model, shape, seed=1), fxpath.rescale(other, shape, seed=2)
        # Rescaling leaves the functions as they are, so one search is enough.
        pair = make_pair(model, other, Given(shape))
        functions = [realization(side.module, side.tensors) for side in (pair.ours, pair.theirs)]
        found = largest_difference(*functions, [(1, *shape)], 1.0, 1, *search)
        for first, second in ((model, other), rescaled):
            bound = fxpath.lipschitz_bound(first, second, shape)
            metric = fxpath.path_metric(first, second, shape)
            layered = find_layered(make_pair(first, second, Given(shape)))
            yield {
                "model": name,
                "weights": weights,
                "change": change,
                "rescaled": first is not model,
                "found": found,
                "exact": metric.exact,
                "path_norm": metric.path_norm,
                "metric": metric.upper,
                "metric_lower": metric.lower,
                "bounds": bound.bounds,
                "rivals": {} if layered is None else layered.bounds(1.0),
            }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bounds as multiples of the largest difference found.

    Two numbers are before and after the random rescaling.
    """
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    names = list(
        dict.fromkeys(n for row in rows for kind in ("bounds", "rivals") for n in row[kind])
    )
    lines = []
    for before, after in pairs:
        line = [before["change"], f"{before['found']:.3g}", "yes" if before["exact"] else "no"]
        line.append(_both(before, after, lambda row: row["metric"]))
        for name in names:
            line.append(_both(before, after, lambda row, name=name: _value(row, name)))
        lines.append(line)
    headers = ["change", "found", "exact", "metric", *names]
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def _value(row: Mapping[str, Any], name: str) -> float:
    value: float = {**row["bounds"], **row["rivals"]}.get(name, math.nan)
    return value


def _both(before: Mapping[str, Any], after: Mapping[str, Any], read: Callable[..., float]) -> str:
    ratios = [read(row) / row["found"] if row["found"] else math.inf for row in (before, after)]
    return " / ".join("-" if math.isnan(ratio) else f"{ratio:.3g}" for ratio in ratios)


if __name__ == "__main__":
    sys.exit(main())
