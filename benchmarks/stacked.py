"""Many small networks of one architecture trained at once, for `benchmarks.pruning_accuracy`.

One small network alone leaves a processor idle most of the time.  Here the tensors of several
networks are stacked, along a new first axis, and every layer is one batched operation: of the
widths used here, three to four times as fast as one network after the other.  All see the same
batches in the same order, so that they differ by their masks alone.

Activations are ``[networks, channels, height, width, batch]``: with the batch innermost, all that
a convolution has to copy is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import stack_module_state
from torch.nn import functional as F

from benchmarks.tasks import Residual

__all__ = ["OPTIMIZERS", "Recipe", "accuracies", "recalibrate", "run", "stack", "train"]

Tensors = dict[str, Tensor]
Masks = Mapping[str, Tensor]

#: Name on the command line -> optimizer without its learning rate.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.05}),
}
BATCH = 50


@dataclass(frozen=True)
class Recipe:
    """How networks are trained.

    Attributes:
        optimizer: among ``OPTIMIZERS``.
        rate: the first and largest learning rate; it falls to 0 along a half cosine.
        epochs: until then.
        seed: of the order of the examples.
    """

    optimizer: str
    rate: float
    epochs: int
    seed: int


def stack(networks: Sequence[nn.Module]) -> Tensors:
    """Parameters and buffers by name, each with a new first axis: networks."""
    parameters, buffers = stack_module_state(list(networks))
    return {name: value.detach().clone() for name, value in (parameters | buffers).items()}


def train(
    network: nn.Module,
    state: Tensors,
    inputs: Tensor,
    classes: Tensor,
    recipe: Recipe,
    epochs: Iterable[int],
    masks: Masks | None = None,
) -> None:
    """Train all networks of a stack, in place.

    Args:
        network: one of them, for its architecture.
        state: of :func:`stack`; it is changed.
        inputs: ``[count, channels, *size]``.
        classes: ``[count]``.
        recipe: of the whole training.
        epochs: those of the recipe that are done here, from 0: after a rewind only the later ones.
        masks: name -> ``[networks, *shape]``, True = kept; other entries are zero and stay so.
    """
    kind, options = OPTIMIZERS[recipe.optimizer]
    trained = {n: p.requires_grad_() for n, p in state.items() if _is_parameter(network, n)}
    optimizer = kind([{"params": list(trained.values())}], lr=recipe.rate, **options)
    fixed = [(trained[name], mask) for name, mask in (masks or {}).items()]
    _erase(fixed)
    count = next(iter(trained.values())).shape[0]
    steps = -(-len(inputs) // BATCH)
    images = _innermost(inputs)
    for epoch in epochs:
        generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
        order = torch.randperm(len(inputs), generator=generator)
        for step, batch in enumerate(order.split(BATCH)):
            done = (epoch + step / steps) / recipe.epochs
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * (1 + math.cos(math.pi * done)) / 2
            outputs = run(network, state, images[..., batch], training=True)
            # A mean over all examples of all networks would divide each one's gradient.
            loss = count * F.cross_entropy(outputs.flatten(0, 1), classes[batch].repeat(count))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _erase(fixed)
    for parameter in trained.values():
        parameter.requires_grad_(False)


def _is_parameter(network: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own in network.get_submodule(path)._parameters


@torch.no_grad()
def _erase(fixed: Iterable[tuple[Tensor, Tensor]]) -> None:
    # Optimizers here act on each entry by itself: what they do to pruned ones is undone whole.
    for parameter, mask in fixed:
        parameter.mul_(mask)


@torch.no_grad()
def accuracies(network: nn.Module, state: Tensors, inputs: Tensor, classes: Tensor) -> list[float]:
    """Percent of examples that each network of a stack classifies right, in eval mode."""
    outputs = run(network, state, _innermost(inputs), training=False)
    return [100 * x for x in (outputs.argmax(2) == classes).float().mean(1).tolist()]


@torch.no_grad()
def recalibrate(network: nn.Module, state: Tensors, inputs: Tensor) -> Tensors:
    """The same parameters, with the batch norms' statistics those of all ``inputs``.

    They are effective weights: after this the networks are no longer the dense one with zeros, and
    (7), by which the path-metric to it is a difference of path-norms, does not hold.
    """
    copied = {name: value.clone() for name, value in state.items()}
    run(network, copied, _innermost(inputs), training=True, momentum=1.0)
    return copied


# -- the layers ------------------------------------------------------------------------------------


def run(
    network: nn.Module, state: Tensors, inputs: Tensor, *, training: bool, momentum: float = 0.1
) -> Tensor:
    """Outputs ``[networks, batch, classes]`` of all networks of a stack.

    Args:
        network: one of them, for its architecture.
        state: of :func:`stack`; running statistics are updated in place if ``training``.
        inputs: ``[1, channels, height, width, batch]``, height 1 for signals.
        training: whether batch norms use the statistics of the batch.
        momentum: of the running statistics.

    Raises:
        TypeError: for a layer that no network of ``benchmarks.tasks`` has.
    """
    return _Stacked(state, training, momentum)(network, "", inputs).transpose(1, 2)


def _innermost(inputs: Tensor) -> Tensor:
    """``[batch, channels, *size]`` to ``[1, channels, height, width, batch]``."""
    images = inputs if inputs.dim() == 4 else inputs[:, :, None]
    return images.permute(1, 2, 3, 0).contiguous()[None]


@dataclass(frozen=True)
class _Stacked:
    state: Tensors
    training: bool
    momentum: float

    def __call__(self, layer: nn.Module, path: str, x: Tensor) -> Tensor:
        """What one module computes, `path` its name with a dot at the end."""
        if isinstance(layer, nn.Sequential):
            for name, child in layer.named_children():
                x = self(child, f"{path}{name}.", x)
            return x
        if isinstance(layer, Residual):
            body = self(layer.body, f"{path}body.", x)
            return F.relu(body + self(layer.shortcut, f"{path}shortcut.", x))
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            return self._convolution(layer, path, x)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._batch_norm(layer, path, x)
        if isinstance(layer, nn.Linear):
            weight, bias = self.state[f"{path}weight"], self.state[f"{path}bias"]
            return torch.baddbmm(bias[:, :, None], weight, x)
        if isinstance(layer, nn.ReLU):
            return F.relu(x)
        if isinstance(layer, nn.MaxPool1d):
            # All pools here have windows side by side, two samples each.
            first, second = x.unflatten(3, (-1, 2)).unbind(4)
            return torch.maximum(first, second)
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return x.mean((2, 3), keepdim=True)
        if isinstance(layer, nn.Flatten):
            return x.flatten(1, 3)
        raise TypeError(f"{path or 'network'}: {type(layer).__name__} has no stacked form")

    def _convolution(self, layer: nn.Conv1d | nn.Conv2d, path: str, x: Tensor) -> Tensor:
        """One product of matrices per network: filters times the patches that they meet."""
        weight = self.state[f"{path}weight"]
        stride, padding = ((0, *v)[-2:] for v in (layer.stride, layer.padding))
        kernel = (1, *layer.kernel_size)[-2:]
        patches: Tensor = _Patches.apply(x, kernel, (stride[0] or 1, stride[1]), padding)
        height, width, batch = patches.shape[3:]
        filters, columns = weight.flatten(2), patches.flatten(1, 2).flatten(2)
        if len(columns) == 1:
            product = (filters.flatten(0, 1) @ columns[0]).unflatten(0, filters.shape[:2])
        else:
            product = filters @ columns
        if layer.bias is not None:
            product = product + self.state[f"{path}bias"][:, :, None]
        return product.unflatten(2, (height, width, batch))

    def _batch_norm(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, path: str, x: Tensor) -> Tensor:
        """All channels of all networks as channels of one."""
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (self.state[path + name].view(-1) for name in names)
        channels = x.flatten(2).flatten(0, 1)[None]
        normal = F.batch_norm(
            channels, mean, variance, weight, bias, self.training, self.momentum, layer.eps
        )
        return normal.view(x.shape)


class _Patches(torch.autograd.Function):
    """``[networks, channels, height, width, batch]`` to patches, their offsets a third axis.

    `torch.nn.functional.unfold` has the batch outermost, and takes three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        networks, channels, height, width, batch = x.shape
        (up, left), (rows, columns) = padding, kernel
        out_height = (height + 2 * up - rows) // stride[0] + 1
        out_width = (width + 2 * left - columns) // stride[1] + 1
        ctx.frame = (networks, channels, height + 2 * up, width + 2 * left, batch)
        ctx.inside = (slice(up, up + height), slice(left, left + width))
        ctx.windows = [
            (
                slice(row, row + stride[0] * (out_height - 1) + 1, stride[0]),
                slice(column, column + stride[1] * (out_width - 1) + 1, stride[1]),
            )
            for row in range(rows)
            for column in range(columns)
        ]
        padded = x.new_zeros(ctx.frame)
        padded[:, :, ctx.inside[0], ctx.inside[1]] = x
        shape = (networks, channels, len(ctx.windows), out_height, out_width, batch)
        patches = x.new_empty(shape)
        for offset, (vertical, horizontal) in enumerate(ctx.windows):
            patches[:, :, offset] = padded[:, :, vertical, horizontal]
        return patches

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        padded = gradient.new_zeros(ctx.frame)
        for offset, (vertical, horizontal) in enumerate(ctx.windows):
            padded[:, :, vertical, horizontal] += gradient[:, :, offset]
        return padded[:, :, ctx.inside[0], ctx.inside[1]], None, None, None
