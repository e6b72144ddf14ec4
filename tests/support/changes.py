"""Other weights for a network: changed ones, and rescaled ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.oracles.networks import Net
from tests.support.nets import randomize

#: How other weights are made from a model's own: entries, uniform numbers in [0, 1) -> entries.
CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pruned": lambda w, r: w * (r > 0.3),
    "towards zero": lambda w, r: w * r,
    "away from zero": lambda w, r: w * (1 + r),
    "close": lambda w, r: w * (0.95 + 0.1 * r),
    "signs flipped": lambda w, r: w * torch.sign(r - 0.2),
    "anything": lambda w, r: 3 * r - 1.5,
}


def changed(model: nn.Module, how: str, seed: int) -> nn.Module:
    """A copy with other weights; batch norms keep their statistics."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(CHANGES[how](parameter, noise.to(parameter.dtype)))
    return other


def inputs_of(net: Net) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(1, *shape, dtype=torch.float64) for shape in net.input_shapes)


def lenet(bias: bool = True) -> nn.Sequential:
    """Convolutions, pooling and linear layers, for 1 x 14 x 14 images, in float64."""
    return randomize(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 8, bias=bias),
            nn.ReLU(),
            nn.Linear(8, 3, bias=bias),
        ).double(),
        weights=True,
    ).eval()


def rescale(model: nn.Sequential, seed: int) -> nn.Sequential:
    """The same function with each hidden channel rescaled by a random power of two."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer, reader in zip(layers, layers[1:], strict=False):
            channels = len(layer.weight)
            factor = 2.0 ** torch.randint(-8, 9, (channels,), generator=generator).double()
            layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.dim() - 1)))
            if layer.bias is not None:
                layer.bias.mul_(factor)
            # A flattened channel is read by several columns.
            columns = factor.repeat_interleave(reader.weight.shape[1] // channels)
            reader.weight.div_(columns.reshape(1, -1, *[1] * (reader.weight.dim() - 2)))
    return model
