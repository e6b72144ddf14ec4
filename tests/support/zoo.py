"""The 51 torchvision models inside the theory, each with the input that the tests give it.

Inputs are small so that the float64 oracle is quick, of odd sizes where the architecture allows, so
that strides and pooling windows meet borders, and large enough for inner convolutions to have some.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import resnet, segmentation, vgg
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import deeplabv3, fcn

from tests.support.nets import randomize

SMALL = (3, 33, 33)  # most networks reduce it to 2 x 2 or 1 x 1


MEDIUM = (3, 65, 65)


INPUTS: dict[str, tuple[int, ...]] = {
    "alexnet": (3, 95, 95),
    "vgg11": SMALL,
    "vgg13": SMALL,
    "vgg16": (3, 32, 32),
    "vgg19": (3, 32, 32),
    "vgg11_bn": SMALL,
    "vgg13_bn": SMALL,
    "vgg16_bn": (3, 32, 32),
    "vgg19_bn": (3, 32, 32),
    "resnet18": MEDIUM,
    "resnet34": MEDIUM,
    "resnet50": MEDIUM,
    "resnet101": SMALL,
    "resnet152": SMALL,
    "resnext50_32x4d": MEDIUM,
    "resnext101_32x8d": SMALL,
    "resnext101_64x4d": SMALL,
    "wide_resnet50_2": SMALL,
    "wide_resnet101_2": SMALL,
    "densenet121": MEDIUM,
    "densenet161": SMALL,
    "densenet169": SMALL,
    "densenet201": SMALL,
    "googlenet": MEDIUM,
    "inception_v3": (3, 107, 107),
    "mnasnet0_5": MEDIUM,
    "mnasnet0_75": MEDIUM,
    "mnasnet1_0": MEDIUM,
    "mnasnet1_3": SMALL,
    "mobilenet_v2": MEDIUM,
    "regnet_x_400mf": MEDIUM,
    "regnet_x_800mf": MEDIUM,
    "regnet_x_1_6gf": SMALL,
    "regnet_x_3_2gf": SMALL,
    "regnet_x_8gf": SMALL,
    "regnet_x_16gf": SMALL,
    "regnet_x_32gf": SMALL,
    "shufflenet_v2_x0_5": MEDIUM,
    "shufflenet_v2_x1_0": MEDIUM,
    "shufflenet_v2_x1_5": MEDIUM,
    "shufflenet_v2_x2_0": SMALL,
    "squeezenet1_0": MEDIUM,
    "squeezenet1_1": (3, 70, 70),
    "r3d_18": (3, 5, 35, 35),
    "mc3_18": (3, 5, 35, 35),
    "r2plus1d_18": (3, 5, 35, 35),
    "s3d": (3, 13, 209, 209),  # the smallest that its last pooling accepts
    "fcn_resnet50": MEDIUM,
    "fcn_resnet101": SMALL,
    "deeplabv3_resnet50": MEDIUM,
    "deeplabv3_resnet101": SMALL,
}


def _vgg_bn() -> nn.Module:
    """VGG11-BN, an eighth as wide, and 64 neurons where 4096 are behind the flattening."""
    widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    model = torchvision.models.VGG(vgg.make_layers(widths, batch_norm=True), 10)
    model.classifier = nn.Sequential(
        *(nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)),
    )
    return model


def _dilated() -> nn.Module:
    """A ResNet as the networks for segmentation have it: dilations for the last two strides."""
    blocks, dilated = [1, 1, 2, 2], [False, True, True]
    whole = torchvision.models.ResNet(
        resnet.Bottleneck, blocks, replace_stride_with_dilation=dilated
    )
    return IntermediateLayerGetter(whole, {"layer4": "out"})


#: Torchvision's networks with a block of each kind, and ten classes: rules and passes see the same
#: operations, in the same order, as in the whole networks, only less often.
FEWER: dict[str, Callable[[], nn.Module]] = {
    # Two blocks that keep the number of channels, and three that change it.
    "resnet": lambda: torchvision.models.ResNet(resnet.BasicBlock, [2, 1, 1, 1], 10),
    "resnext": lambda: torchvision.models.ResNet(
        resnet.Bottleneck, [2, 1, 1, 1], 10, groups=8, width_per_group=4
    ),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10),
    "mobilenet": lambda: torchvision.models.MobileNetV2(
        10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 1]]
    ),
    "shufflenet": lambda: torchvision.models.ShuffleNetV2(
        [2, 1, 1], [24, 48, 96, 192, 256], num_classes=10
    ),
    "vgg_bn": _vgg_bn,
    "fcn": lambda: segmentation.FCN(_dilated(), fcn.FCNHead(2048, 10)),
    "deeplabv3": lambda: segmentation.DeepLabV3(_dilated(), deeplabv3.DeepLabHead(2048, 10)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Make a model of torchvision, or of `FEWER`, with random BatchNorms and biases.

    The global random number generator is left as it was.
    """
    options: dict[str, object] = {"weights": None}
    if name.startswith(("fcn", "deeplab")):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # torch's own scheme; theirs takes half a minute
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        make = FEWER.get(name) or partial(torchvision.models.get_model, name, **options)
        model = make()
    return randomize(model, seed)


def refused() -> list[str]:
    """Name torchvision's other classifiers: each has some operation outside the theory."""
    every = torchvision.models.list_models(module=torchvision.models)
    return sorted(set(every) - set(INPUTS))


class _WithoutInitialization(TorchFunctionMode):
    """Zeros instead of random numbers: for large models these take most of the construction."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return nn.init.zeros_(kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0])
        return func(*args, **(kwargs or {}))


def build_hollow(name: str) -> nn.Module:
    """Make a torchvision model quickly, its weights zero: enough to look at its operations."""
    with _WithoutInitialization():
        return torchvision.models.get_model(name, weights=None)


class _WithoutMemory(TorchFunctionMode):
    """Parameters that have a shape and no numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


@cache
def module_types(name: str) -> set[type[nn.Module]]:
    """The classes of which a torchvision model is built."""
    with _WithoutMemory():
        return {
            type(module) for module in torchvision.models.get_model(name, weights=None).modules()
        }
