"""A slow float64 oracle for the path-norm and the Path-Mag shares of a model.

It shares neither code nor idea with the package: no graph is captured. The model's own `forward`
runs at full resolution on tensors of class `Lifted`, whose `__torch_function__` replaces each
operation by its lifted counterpart: a weight w becomes |w|^q, ReLU the identity, a maximum the sum
over what it ranges over. The input is all ones; the sum S of all outputs is then ||Phi||_q^q, and
autograd gives the shares a dlog(S)/da for a = |w|^q.

An operation without a rule raises `UnknownOperation`; nothing passes unseen.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.lifted import Lifting
from tests.oracles.lifting_rules import RULES


@dataclass
class Reference:
    """What `reference` returns; all numbers are float64."""

    path_norm: float
    log10_path_norm: float
    scores: dict[str, Tensor]


def reference(
    model: nn.Module,
    inputs_or_shape: Any,
    q: float = 1.0,
    *,
    until: str | None = None,
    scores: bool = True,
) -> Reference:
    """Return ||Phi||_q and every parameter's share of ||Phi||_q^q.

    Args:
        model: Any module in any mode; a copy in float64 and eval mode is evaluated.
        inputs_or_shape: A shape without batch axis, a list of such shapes, a tensor, or a tuple or
            list of tensors (of which only the shapes without their batch axis matter).
        q: The exponent; 0 counts the paths that are not zero.
        until: Name of a module; its output becomes the output of the network.
        scores: Whether to differentiate, which takes two thirds of the time.

    Raises:
        UnknownOperation: An operation has no rule here.
    """
    twin = _float64_copy(model)
    shapes = _shapes(inputs_or_shape)
    lifting = Lifting(twin, q, RULES)
    with torch.set_grad_enabled(scores):
        total = lifting.run(shapes, until)
        # Whether a BatchNorm is the only reader of a convolution is known after a whole pass only.
        shared = frozenset(call for call, count in lifting.readers.items() if count > 1)
        if shared:
            lifting = Lifting(twin, q, RULES, shared)
            total = lifting.run(shapes, until)

    coordinates = list(lifting.coordinates.values())
    del lifting, twin  # a gigabyte for VGG: only the leaves are needed from here on
    shares: dict[str, Tensor] = {}
    if coordinates and total.requires_grad:
        leaves = [leaf for _, leaf in coordinates]
        gradients: list[Tensor | None] = [*torch.autograd.grad(total, leaves, allow_unused=True)]
        for i, (name, leaf) in enumerate(coordinates):
            gradient, gradients[i] = gradients[i], None
            if gradient is None or not total.item():
                share = torch.zeros_like(leaf)
            else:
                share = gradient.div(total.item()).mul_(leaf.detach())
            # A parameter that is used several times collects the shares of all its uses.
            shares[name] = shares[name] + share if name in shares else share
    log10_sum = math.log10(total.item()) if total.item() else -math.inf
    root = q or 1.0
    return Reference(total.item() ** (1 / root), log10_sum / root, shares)


def _shapes(inputs_or_shape: Any) -> list[tuple[int, ...]]:
    """Normalize the ways to name inputs to a list of shapes without batch axis."""
    if isinstance(inputs_or_shape, Tensor):
        return [tuple(inputs_or_shape.shape[1:])]
    if all(isinstance(x, int) for x in inputs_or_shape):
        return [tuple(inputs_or_shape)]
    return [tuple(x.shape[1:]) if isinstance(x, Tensor) else tuple(x) for x in inputs_or_shape]


def _float64_copy(model: nn.Module) -> nn.Module:
    """Copy the model to float64 and eval mode, parameters requiring gradients."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attribute in vars(module).values():
            # deepcopy refuses computed tensors, such as the masked weight of torch's own pruning.
            if isinstance(attribute, Tensor) and attribute.grad_fn is not None:
                memo[id(attribute)] = attribute.detach().clone()
    twin = copy.deepcopy(model, memo).double().eval()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    return twin
