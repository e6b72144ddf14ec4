"""One cell of `benchmarks.pruning_accuracy`: a network is trained, pruned in one way, retrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

import fxpath
from benchmarks.pruning_masks import Masks, Method, Pruner
from benchmarks.stacked import Recipe, Tensors, accuracies, recalibrate, stack, train
from benchmarks.tasks import TASKS, Data

__all__ = ["REWIND", "Row", "Trained", "measure", "prepare"]

Row = dict[str, Any]

#: Epochs until the weights that pruned networks are rewound to.
REWIND = 2


@dataclass(frozen=True)
class Trained:
    """A dense network, and what is needed to prune and retrain it.

    Attributes:
        network: trained, in eval mode.
        pruners: of the network, and of the same function with other weights, by powers of two.
        early: its weights as they were after the first epochs, a stack of one.
        accuracy: of the network, in percent.
        data: examples.
        recipe: how it was trained, and is retrained.
        normalized: whether it has batch norms.
    """

    network: nn.Module
    pruners: tuple[Pruner, Pruner]
    early: Tensors
    accuracy: float
    data: Data
    recipe: Recipe
    normalized: bool


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
    pruners = Pruner(network, examples, seed), Pruner(rescaled, examples, seed)
    return Trained(network, pruners, early, accuracy, data, recipe, task.normalized)


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
        RuntimeError: if a mask that must not change with the rescaling does; if `fxpath.prune`
            chooses otherwise.
    """
    plain, moved = (pruner.masks(method, amounts) for pruner in trained.pruners)
    original, _ = trained.pruners
    fixed = {"dense": round(trained.accuracy, 3), "amounts": list(amounts)}
    if trained.recipe.seed == 0:
        # Once for each task, optimizer and method: every comparison captures the network.
        middle = amounts[len(amounts) // 2]
        fixed["prune"] = {str(middle): original.compare(method, middle)}
    if method.invariant:
        fault = "rescaling changes a mask"
        ties = [original.differing(method, *pair, fault) for pair in zip(plain, moved, strict=True)]
        return [{"network": "both"} | fixed | _worth(trained, plain) | {"ties": ties}]
    # One training of them all is cheaper than two.
    worth = _worth(trained, plain + moved)
    parts = {"original": slice(len(plain)), "rescaled": slice(len(plain), None)}
    return [
        {"network": network} | fixed | {name: column[part] for name, column in worth.items()}
        for network, part in parts.items()
    ]


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
    found["lost"] = trained.pruners[0].lost(masks)
    # An example is 0.1 % of the accuracy: more digits would only make the file long.
    return {name: [round(value, 6) for value in column] for name, column in found.items()}
