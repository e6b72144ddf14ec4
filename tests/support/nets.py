"""Networks that several tests share, and the one way to fill them with random numbers."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

M = TypeVar("M", bound=nn.Module)


def randomize(model: M, seed: int = 0, *, weights: bool = False) -> M:
    """Random statistics and weights for every batch norm, and random biases, in place.

    Batch norm weights and biases of both signs and biases of the order of the weights make every
    mistake in folding visible. With ``weights`` all other parameters are drawn too; of a matrix
    that is called a weight one entry in five is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()

    def fill(tensor: Tensor, values: Tensor) -> None:
        tensor.copy_(values)
        drawn.add(id(tensor))

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    with torch.no_grad():
        for module in model.modules():
            mean, var = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                fill(mean, uniform(mean, -0.5, 0.5))
                fill(var, uniform(var, 0.5, 1.5))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                sign = uniform(module.weight, -1, 1).sign()
                fill(module.weight, sign * uniform(module.weight, 0.5, 1.5))
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                fill(bias, uniform(bias, -0.3, 0.3))
        for name, parameter in model.named_parameters() if weights else ():
            if id(parameter) not in drawn:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if parameter.dim() > 1:
                    values *= math.sqrt(2 / parameter[0].numel())
                    if "weight" in name:
                        values *= torch.rand(values.shape, generator=generator) > 0.2
                parameter.copy_(values)
    return model


def resnet18() -> nn.Module:
    return randomize(torchvision.models.resnet18(num_classes=10)).eval()


def small_vgg11_bn() -> nn.Module:
    """VGG11-BN for 32 x 32 images: its 100 million weights after the convolutions left out."""
    model = torchvision.models.vgg11_bn(num_classes=10)
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return randomize(model).eval()


def mlp(bias: bool = True) -> nn.Sequential:
    return randomize(
        nn.Sequential(
            nn.Linear(5, 8, bias=bias),
            nn.ReLU(),
            nn.Linear(8, 6, bias=bias),
            nn.ReLU(),
            nn.Linear(6, 3, bias=bias),
        ),
        weights=True,
    ).eval()


class SmallNet(nn.Module):
    """Convolution, BatchNorm, a skip connection, pooling and a linear layer, for `SMALL`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.inner = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(x + self.inner(x))
        return self.fc(self.drop(torch.flatten(F.max_pool2d(x, 2), 1)))


SMALL = (2, 6, 6)


def small_net() -> nn.Module:
    return randomize(SmallNet(), weights=True).eval()


class Tied(nn.Module):
    """A layer used twice in a row and one of whose weights is tied to another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(self.first(x)))))


def chain(weight: float, depth: int, width: int = 2) -> nn.Sequential:
    """Linear layers without biases all of whose weights are equal; its log10 is `chain_log10`."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for parameter in model.parameters():
        nn.init.constant_(parameter, weight)
    return model


def chain_log10(model: nn.Sequential) -> float:
    """Of the width ** (depth + 1) paths each is the product of one weight per layer."""
    weights = [float(parameter.detach().flatten()[0]) for parameter in model.parameters()]
    paths = (len(weights) + 1) * math.log10(model[0].in_features)
    return paths + sum(math.log10(weight) for weight in weights)


def pruned_net() -> nn.Module:
    torch.manual_seed(0)
    model = small_net()
    prune.random_unstructured(model.conv, "weight", amount=0.3)
    prune.ln_structured(model.inner, "weight", amount=1, n=1, dim=0)
    prune.l1_unstructured(model.fc, "bias", amount=1)
    return model


def parametrized_net() -> nn.Module:
    torch.manual_seed(0)
    model = small_net()
    parametrizations.weight_norm(model.conv)
    parametrizations.spectral_norm(model.inner)
    return model
