"""The input shape of a model that comes without one.

Three sources, in this order:

1. torchvision's models are known by their class: 224 x 224 images for nearly all of them.
2. A first linear layer names its number of features: `(in_features,)`.
3. A first convolution names its channels, and the linear layer behind it leaves only a few lengths
   (or side lengths of a square image) that fit: small ones and the customary ones are tried. A net
   of total stride s, whose last positions are dropped by rounding, accepts s lengths in a row; the
   multiple of s among them is the length that it was made for: 28 or 32 for a LeNet, 224 for a VGG
   without adaptive pooling.

An image net that accepts every size and answers always in the same shape (global or adaptive
pooling) gets 224 x 224, by convention. For a 1-d net there is no such convention, and a net whose
output grows with its input has no size of its own: both have to be told.

Candidates are tried on meta tensors, which have a shape and no data, and on a skeleton of the model
in eval mode: the model itself never runs.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxpath.model.copies import skeleton
from fxpath.model.state import untouched
from fxpath.private import tree_leaves, tree_map_only, uncompiled
from fxpath.sharding import is_sharded_model

Shape = tuple[int, ...]

# torchvision's whole models by class name; their building blocks are not in the table.
_IMAGE = (3, 224, 224)
_CLIP = (3, 16, 224, 224)
_TORCHVISION: dict[str, Shape] = {
    **dict.fromkeys(
        (
            *("AlexNet", "ConvNeXt", "DenseNet", "EfficientNet", "GoogLeNet", "MNASNet", "MaxVit"),
            *("MobileNetV2", "MobileNetV3", "RegNet", "ResNet", "ShuffleNetV2", "SqueezeNet"),
            *("SwinTransformer", "VGG", "VisionTransformer", "DeepLabV3", "FCN", "LRASPP"),
        ),
        _IMAGE,
    ),
    "Inception3": (3, 299, 299),
    "VideoResNet": (3, 16, 112, 112),
    "S3D": _CLIP,
    "MViT": _CLIP,
    "SwinTransformer3d": _CLIP,
}
_USUAL_SIDE = 224
#: Sides of images and lengths of signals that are tried, the customary ones of each first.
_SIDES = (
    *(224, 32, 28, 64, 128, 256, 96, 84, 112, 160, 192, 200, 240, 288, 299, 320, 384, 448, 512),
    *range(1, 65),
)
_LENGTHS = (
    *(1000, 16000, 48000, 8000, 22050, 24000, 32000, 44100, 80000, 96000, 2500, 5000, 10000),
    *(300, 360, 400, 500, 600, 720, 750, 784, 2000, 3000, 4000, *(2**n for n in range(9, 17))),
    *range(1, 257),
)

# What no size of its own reaches, by number of spatial axes: two seconds of sound, a large photo.
_LONGEST = {1: 2**17, 2: 2**10}
# Two samples, not one: a convolution would take a single sample for an unbatched one, and a batch
# axis that `view(-1, features)` has changed shows.
_BATCH = 2


class _ShapesOnly(TorchFunctionMode):
    """Runs every torch function on meta tensors, which have a shape and no data.

    Fake tensors would do the same for five times the price, and log every failure.
    """

    def __init__(self) -> None:
        super().__init__()
        # By identity; the tensor is kept so that its id stays its own.
        self._metas: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # In-place functions, too, change the meta tensor and not the model's.
        args, kwargs = tree_map_only(torch.Tensor, self._to_meta, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _to_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._metas:
            self._metas[id(tensor)] = tensor, tensor.detach().to("meta")
        return self._metas[id(tensor)][1]


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of a model to run once; of a sharded one, whose copy has no values, on shapes only."""
    copied = skeleton(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if is_sharded_model(model):
            stack.enter_context(torch.device("meta"))
            stack.enter_context(_ShapesOnly())
        yield copied


class _Probe:
    """Sends candidate shapes through a skeleton.

    Attributes:
        failure: What went wrong with the last candidate that did not fit.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        self._skeleton = skeleton
        like = next((p for p in skeleton.parameters() if p.is_floating_point()), torch.empty(0))
        self._dtype = like.dtype
        self._results: dict[Shape, list[Shape] | None] = {}
        self.failure = ""

    def fits(self, shape: Shape) -> bool:
        """Whether one candidate shape (without the batch axis) goes through."""
        return self.outputs(shape) is not None

    def outputs(self, shape: Shape) -> list[Shape] | None:
        """The shapes of all output tensors, without the batch axis, if it goes through."""
        if shape not in self._results:
            self._results[shape] = self._try(shape)
        return self._results[shape]

    def _try(self, shape: Shape) -> list[Shape] | None:
        # The device is for tensors that the forward method creates.
        device = torch.device("meta")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), device, _ShapesOnly():
                x = torch.empty(_BATCH, *shape, dtype=self._dtype)
                outputs = [y for y in tree_leaves(self._skeleton(x)) if isinstance(y, torch.Tensor)]
        # Whatever a user's forward raises, it means that this candidate does not fit; the text
        # goes into the error if no other one does.
        except Exception as error:
            self.failure = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
            return None
        # `view(-1, features)` of a map that is too large makes several samples out of one.
        if {y.shape[0] if y.dim() else 0 for y in outputs} != {_BATCH}:
            self.failure = "the output does not have the input's batch axis"
            return None
        return [tuple(y.shape[1:]) for y in outputs]


def infer_input_shape(model: nn.Module) -> Shape:
    """Infers the shape of one input sample from a model.

    The model is not run and not changed: candidates go through an eval-mode skeleton of it on
    tensors without data.

    Args:
        model: A torchvision model, a plain MLP, a convolution net for images or a 1-d convolution
            net; also wrapped in `DataParallel` or `torch.compile`.

    Returns:
        The shape without the batch axis: `(features,)`, `(channels, length)`, `(channels, height,
        width)` or `(channels, frames, height, width)`.

    Raises:
        ValueError: If the shape is not determined by the model. The message says why, and to pass
            `input_shape`.

    Example:
        >>> infer_input_shape(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)))
        (20,)
        >>> infer_input_shape(nn.Sequential(
        ...     nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        ...     nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        ...     nn.Flatten(), nn.Linear(16 * 5 * 5, 10),
        ... ))
        (1, 28, 28)
        >>> infer_input_shape(nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 48, 5)))
        (2, 50)
    """
    return guess_input_shape(model)[0]


def guess_input_shape(model: nn.Module) -> tuple[Shape, bool]:
    """The same, and whether it is a convention rather than the model's only shape."""
    model = _unwrap(model)
    known = _torchvision_shape(model)
    if known is not None:
        return known, True

    layers = _first_layers(model)
    if not layers:
        raise _unknown(model, "it has no linear layer and no 1-d or 2-d convolution to go by")
    for layer in layers:
        if any(isinstance(p, nn.UninitializedParameter) for p in layer.parameters()):
            raise _unknown(model, f"a {type(layer).__name__} has not seen an input yet")

    with untouched(model):
        return _probed(model, layers)


def _probed(model: nn.Module, layers: list[nn.Module]) -> tuple[Shape, bool]:
    """The shape that goes through a copy, and whether it is a convention."""
    probe = _Probe(skeleton(model))
    reasons = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            shape: Shape | str = (layer.in_features,)
            if not probe.fits((layer.in_features,)):
                shape = f"{layer.in_features} features do not go through ({probe.failure})"
        elif isinstance(layer, nn.Conv2d):
            shape = _image_shape(probe, layer.in_channels)
        else:
            assert isinstance(layer, nn.Conv1d)
            shape = _signal_shape(probe, layer.in_channels)
        if not isinstance(shape, str):
            return shape, isinstance(layer, nn.Conv2d) and _takes_any(probe, layer.in_channels)
        reasons.append(shape)
    raise _unknown(model, "; ".join(reasons))


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = uncompiled(model)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _torchvision_shape(model: nn.Module) -> Shape | None:
    """The customary shape of a torchvision model (or a subclass of one), else None."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("torchvision.models.") and cls.__name__ in _TORCHVISION:
            _, *sides = _TORCHVISION[cls.__name__]
            # A vision transformer is built for one image size, and says which.
            if isinstance(size := getattr(model, "image_size", None), int):
                sides = [size, size]
            # People replace the first layer to read grey or multispectral images.
            convs = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
            first = next(convs, None)
            return (3 if first is None else first.in_channels, *sides)
    return None


def _first_layers(model: nn.Module) -> list[nn.Module]:
    """The first layer of each kind that names its input size, in order of registration.

    The first registered layer is usually the first that runs, but need not be: the others are
    there to be tried if it fails.
    """
    found: dict[type[nn.Module], nn.Module] = {}
    for module in model.modules():
        for kind in (nn.Linear, nn.Conv1d, nn.Conv2d):
            if isinstance(module, kind):
                found.setdefault(kind, module)
    return list(found.values())


def _image_shape(probe: _Probe, channels: int) -> Shape | str:
    """The shape of the square image that fits, or why there is none."""
    usual = (channels, _USUAL_SIDE, _USUAL_SIDE)
    if _takes_any(probe, channels):
        large = (channels, _LONGEST[2], _LONGEST[2])
        if probe.fits(usual) and probe.outputs(usual) == probe.outputs(large):
            return usual
        return "its output grows with the image, so that no size is its own"
    side = _only_size(lambda side: probe.fits((channels, side, side)), _SIDES)
    if side is not None:
        return (channels, side, side)
    return f"no square image of a customary size goes through ({probe.failure})"


def _takes_any(probe: _Probe, channels: int) -> bool:
    """Whether images of every size go through, so that the usual one is a convention."""
    return probe.fits((channels, _LONGEST[2], _LONGEST[2]))


def _signal_shape(probe: _Probe, channels: int) -> Shape | str:
    """The channels and length of the signal that fits, or why there is none."""
    if probe.fits((channels, _LONGEST[1])):
        return "it accepts signals of any length, and the path-norm may depend on it"
    length = _only_size(lambda length: probe.fits((channels, length)), _LENGTHS)
    if length is not None:
        return (channels, length)
    return f"no signal of a customary length goes through ({probe.failure})"


def _only_size(fits: Callable[[int], bool], known: Iterable[int]) -> int | None:
    """The size that a net was made for, if one of those that are known fits it.

    Rounding down by a total stride s lets s sizes in a row through, and s in a row hold exactly one
    multiple of s.

    Example:
        >>> _only_size(lambda n: 193 <= n <= 224, (28, 200))
        224
    """
    first = last = next((size for size in known if fits(size)), 0)
    if not first:
        return None
    while first > 1 and fits(first - 1):
        first -= 1
    while fits(last + 1):
        last += 1
    stride = last - first + 1
    return last // stride * stride


def _unknown(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"cannot infer the input shape of {type(model).__name__}: {reason}. "
        "Pass it without the batch axis, e.g. input_shape=(3, 224, 224)"
    )
