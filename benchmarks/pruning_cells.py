"""One cell of `benchmarks.pruning_accuracy`: a network is trained, pruned in one way, retrained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxpath
from benchmarks.tasks import TASKS, Data
from benchmarks.training import Recipe, Tensors, accuracies, recalibrate, stack, train
from fxpath import criteria
from fxpath.program import build

__all__ = ["METHODS", "REWIND", "Method", "Trained", "measure", "prepare"]

Masks = Mapping[str, Tensor]
Row = dict[str, Any]

#: Epochs until the weights that pruned networks are rewound to.
REWIND = 2
STEPS = 10
#: One estimate of OBD's Hessian is noise for the most part.
ESTIMATES = 4
#: Two scores of which rounding may turn the order, relative to each other.
TIE = 1e-5


@dataclass(frozen=True)
class Method:
    """A way to choose what is pruned.

    Attributes:
        title: for tables and plots.
        criterion: what scores the weights.
        layer_adaptive: whether scores are relative to what remains of their layer.
        steps: between which they are computed anew.
    """

    title: str
    criterion: str
    layer_adaptive: bool = False
    steps: int = 1

    @property
    def invariant(self) -> bool:
        """Whether the mask must not change with a rescaling; random scores never look."""
        return self.criterion in ("path_magnitude", "canonical_magnitude", "random")


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude", "magnitude"),
    "lamp": Method("magnitude / layer (LAMP)", "magnitude", layer_adaptive=True),
    "path-mag": Method("Path-Mag", "path_magnitude"),
    "path-mag-layer": Method("Path-Mag / layer", "path_magnitude", layer_adaptive=True),
    "path-mag-steps": Method(f"Path-Mag, {STEPS} steps", "path_magnitude", steps=STEPS),
    "path-mag-steps-layer": Method(
        f"Path-Mag / layer, {STEPS} steps", "path_magnitude", layer_adaptive=True, steps=STEPS
    ),
    "canonical": Method("canonical magnitude", "canonical_magnitude"),
    "canonical-layer": Method(
        "canonical magnitude / layer", "canonical_magnitude", layer_adaptive=True
    ),
    "obd": Method("OBD", "obd"),
    "random": Method("random", "random"),
}


@dataclass(frozen=True)
class Trained:
    """A dense network, and what is needed to prune and retrain it.

    Attributes:
        network: trained, in eval mode.
        rescaled: the same function with other weights, by powers of two.
        early: its weights as they were after the first epochs, a stack of one.
        accuracy: of the network, in percent.
        data: examples.
        recipe: how it was trained, and is retrained.
        normalized: whether it has batch norms.
    """

    network: nn.Module
    rescaled: nn.Module
    early: Tensors
    accuracy: float
    data: Data
    recipe: Recipe
    normalized: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.data.train_inputs.shape[1:])


@lru_cache(maxsize=1)
def prepare(name: str, optimizer: str, seed: int) -> Trained:
    """Train one dense network.

    Args:
        name: of the task, among ``TASKS``.
        optimizer: among ``OPTIMIZERS``.
        seed: of the initial weights, the order of the examples and the rescaling.
    """
    task = TASKS[name]
    data = task.data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.network()
    recipe = Recipe(optimizer, task.rates[optimizer], task.epochs, seed)
    state = stack([network])
    examples = data.train_inputs, data.train_classes
    train(network, state, *examples, recipe, range(REWIND))
    early = {key: value.clone() for key, value in state.items()}
    train(network, state, *examples, recipe, range(REWIND, task.epochs))
    network.load_state_dict({key: value[0] for key, value in state.items()})
    network.eval()
    (accuracy,) = accuracies(network, state, data.test_inputs, data.test_classes)
    shape = tuple(data.train_inputs.shape[1:])
    rescaled = fxpath.rescale(network, shape, seed=seed)
    return Trained(network, rescaled, early, accuracy, data, recipe, task.normalized)


def measure(trained: Trained, method: Method, amounts: Sequence[float]) -> list[Row]:
    """One row for the network and one for the rescaled network, or one for both.

    Args:
        trained: of :func:`prepare`.
        method: how to prune.
        amounts: shares of the weights.

    Returns:
        Rows whose ``network`` is "original" and "rescaled"; of an invariant method "both".  Lists
        have one entry for each amount.

    Raises:
        RuntimeError: if a mask that must not change with the rescaling does.
    """
    networks = trained.network, trained.rescaled
    plain, moved = (_masks(trained, network, method, amounts) for network in networks)
    fixed = {"dense": round(trained.accuracy, 3), "amounts": list(amounts)}
    if method.invariant:
        ties = [_ties(trained, method, *pair) for pair in zip(plain, moved, strict=True)]
        return [{"network": "both"} | fixed | _worth(trained, plain) | {"ties": ties}]
    # One training of them all is cheaper than two.
    worth = _worth(trained, plain + moved)
    parts = {"original": slice(len(plain)), "rescaled": slice(len(plain), None)}
    return [
        {"network": network} | fixed | {name: column[part] for name, column in worth.items()}
        for network, part in parts.items()
    ]


# -- masks -----------------------------------------------------------------------------------------


def _masks(
    trained: Trained, network: nn.Module, method: Method, amounts: Sequence[float]
) -> list[Masks]:
    """What is kept of a network, at each amount."""
    # Scores of the whole network are the same at each amount; steps compute their own.
    criterion = method.criterion if method.steps > 1 else _scores(trained, network, method)
    return [
        fxpath.prune(
            network,
            amount,
            trained.shape,
            criterion=criterion,
            layer_adaptive=method.layer_adaptive,
            steps=method.steps,
        ).masks
        for amount in amounts
    ]


def _scores(trained: Trained, network: nn.Module, method: Method) -> dict[str, Tensor]:
    """Absolute scores of one network."""
    if method.criterion == "path_magnitude":
        return criteria.path_magnitude(network, trained.shape)
    if method.criterion == "canonical_magnitude":
        return criteria.canonical_magnitude(network, trained.shape)
    sizes = criteria.magnitude(network)
    if method.criterion == "random":
        generator = torch.Generator().manual_seed(trained.recipe.seed)
        return {n: torch.rand(size.shape, generator=generator) for n, size in sizes.items()}
    if method.criterion == "obd":
        batch = trained.data.train_inputs, trained.data.train_classes
        found = [
            criteria.obd(network, cross_entropy, batch, seed=seed) for seed in range(ESTIMATES)
        ]
        # Curvature is not negative where training has ended: that is noise, on weights that matter.
        return {name: (sum(scores[name] for scores in found) / ESTIMATES).abs() for name in sizes}
    return sizes


def _ties(trained: Trained, method: Method, before: Masks, after: Masks) -> int:
    """Number of entries that two masks treat differently, all within rounding of the threshold.

    Raises:
        RuntimeError: if one is not.
    """
    differing = {name: before[name] != after[name] for name in before}
    count = sum(int(part.sum()) for part in differing.values())
    if count:
        scores = _scores(trained, trained.network, method)
        if method.layer_adaptive:
            scores = criteria.relative_to_layer({name: scores[name] for name in before})
        threshold = max(float(scores[n][~m].max()) for n, m in before.items() if not m.all())
        for name, part in differing.items():
            off = (scores[name][part] / threshold - 1).abs()
            # Scores between the steps are not known, and each step's choice bears on the next.
            if method.steps > 1 or bool((off > TIE).any()):
                raise RuntimeError(
                    f"{name}: rescaling changes the mask of {method.title} in {int(part.sum())} "
                    "entries, not all within rounding of the threshold"
                )
    return count


# -- what a mask is worth --------------------------------------------------------------------------


def _worth(trained: Trained, masks: Sequence[Masks]) -> dict[str, list[Any]]:
    """Accuracy in percent after finetuning and before, and the share of the path-norm lost."""
    data, network, count = trained.data, trained.network, len(masks)
    tests = data.test_inputs, data.test_classes
    stacked = {name: torch.stack([mask[name] for mask in masks]) for name in masks[0]}
    zeroed = stack([network] * count)
    for name, mask in stacked.items():
        zeroed[name] *= mask
    tuned = {name: value.repeat_interleave(count, 0) for name, value in trained.early.items()}
    examples = data.train_inputs, data.train_classes
    epochs = range(REWIND, trained.recipe.epochs)
    train(network, tuned, *examples, trained.recipe, epochs, stacked)
    found: dict[str, list[Any]] = {
        "kept": [sum(int(kept.sum()) for kept in mask.values()) for mask in masks],
        "accuracy": accuracies(network, tuned, *tests),
        "pruned": accuracies(network, zeroed, *tests),
    }
    if trained.normalized:
        adapted = recalibrate(network, zeroed, data.train_inputs)
        found["recalibrated"] = accuracies(network, adapted, *tests)
    found["lost"] = _lost(trained, masks)
    # An example is 0.1 % of the accuracy: more digits would only make the file long.
    return {name: [round(value, 6) for value in column] for name, column in found.items()}


def _lost(trained: Trained, masks: Sequence[Masks]) -> list[float]:
    """The path-metric to the dense network, as a share of its path-norm.

    Zeros alone only take paths away, so that by (7) the metric is what the path-norm loses.
    """
    network = copy.deepcopy(trained.network)
    program = build(network, trained.shape)
    dense = program.path_norm()
    lost = []
    for mask in masks:
        for name, kept in mask.items():
            network.get_parameter(name).data.copy_(trained.network.get_parameter(name) * kept)
        lost.append(1 - program.path_norm() / dense)
    return lost
