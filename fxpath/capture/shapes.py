"""The input shape of a model that comes without one.

Three sources, in this order:

1. torchvision's models are known by their class: 224 x 224 images for nearly all of them.
2. A first linear layer names its number of features: `(in_features,)`.
3. A first convolution names its channels, and the linear layer behind it leaves only a few lengths
   (or side lengths of a square image) that fit. A net of total stride s, whose last positions are
   dropped by rounding, accepts s lengths in a row; the multiple of s among them is the length that
   it was made for: 28 or 32 for a LeNet, 224 for a VGG without adaptive pooling.

An image net that accepts every size and answers always in the same shape (global or adaptive
pooling) gets 224 x 224, by convention. For a 1-d net there is no such convention, and a net whose
output grows with its input has no size of its own: both have to be told.

Candidates are tried on meta tensors, which have a shape and no data, and on a skeleton of the model
in eval mode: the model itself never runs.
"""

from __future__ import annotations

import enum
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxpath.model.copies import skeleton
from fxpath.model.state import untouched

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
_KNOWN_SIDES = (28, 32, 64, 96, 128, 224, 256)

# Longest candidate by number of spatial axes: two seconds of sound, a large photograph.
_LONGEST = {1: 2**17, 2: 2**10}
# Two samples, not one: a convolution would take a single sample for an unbatched one, and a batch
# axis that `view(-1, features)` has changed shows.
_BATCH = 2
_PRODUCTS = (
    *(torch.mm, torch.Tensor.mm),
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
)


class _Fit(enum.Enum):
    """How a candidate size went through the skeleton."""

    TOO_SMALL = enum.auto()
    FITS = enum.auto()
    TOO_LARGE = enum.auto()


def _gets_too_much(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a linear map or a reshape that failed had more features to read than it wants."""
    if func in (F.linear, *_PRODUCTS) and len(args) > 1:
        return bool(args[0].shape[-1] > args[1].shape[-1 if func is F.linear else 0])
    if func in (torch.Tensor.view, torch.Tensor.reshape, torch.reshape):
        sizes = args[1] if isinstance(args[1], tuple | list) else args[1:]
        # The first size is the batch axis, as a number or as -1.
        return args[0].numel() // _BATCH > math.prod(sizes[1:]) > 0
    return False


class _ShapesOnly(TorchFunctionMode):
    """Runs every torch function on meta tensors, which have a shape and no data.

    Fake tensors would do the same for five times the price, and log every failure.

    Attributes:
        too_large: Whether a linear map or a reshape failed on more features than it wants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.too_large = False
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
        try:
            return func(*args, **kwargs)
        except Exception:
            self.too_large = _gets_too_much(func, args)
            raise

    def _to_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._metas:
            self._metas[id(tensor)] = tensor, tensor.detach().to("meta")
        return self._metas[id(tensor)][1]


class _Probe:
    """Sends candidate shapes through a skeleton.

    Attributes:
        failure: What went wrong with the last candidate that did not fit.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        self._skeleton = skeleton
        like = next((p for p in skeleton.parameters() if p.is_floating_point()), torch.empty(0))
        self._dtype = like.dtype
        self._results: dict[Shape, tuple[_Fit, list[Shape]]] = {}
        self.failure = ""

    def fit(self, shape: Shape) -> _Fit:
        """How one candidate shape (without the batch axis) went."""
        return self._run(shape)[0]

    def outputs(self, shape: Shape) -> list[Shape]:
        """The shapes of all output tensors, without the batch axis."""
        return self._run(shape)[1]

    def _run(self, shape: Shape) -> tuple[_Fit, list[Shape]]:
        if shape not in self._results:
            self._results[shape] = self._try(shape)
        return self._results[shape]

    def _try(self, shape: Shape) -> tuple[_Fit, list[Shape]]:
        watch = _ShapesOnly()
        try:
            # The device is for tensors that the forward method creates.
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("meta"), watch:
                x = torch.empty(_BATCH, *shape, dtype=self._dtype)
                outputs = [y for y in tree_leaves(self._skeleton(x)) if isinstance(y, torch.Tensor)]
        # Whatever a user's forward raises, it means that this candidate does not fit; the text
        # goes into the error if no other one does.
        except Exception as error:
            self.failure = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
            return (_Fit.TOO_LARGE if watch.too_large else _Fit.TOO_SMALL), []
        # `view(-1, features)` of a map that is too large makes several samples out of one.
        batches = {y.shape[0] if y.dim() else 0 for y in outputs}
        if batches != {_BATCH}:
            self.failure = "the output does not have the input's batch axis"
            return (_Fit.TOO_LARGE if max(batches, default=0) > _BATCH else _Fit.TOO_SMALL), []
        return _Fit.FITS, [tuple(y.shape[1:]) for y in outputs]


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
            if probe.fit((layer.in_features,)) is not _Fit.FITS:
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
            inner = getattr(model, "_orig_mod", None)
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
    longest = _LONGEST[2]
    large, usual = (channels, longest, longest), (channels, _USUAL_SIDE, _USUAL_SIDE)
    if probe.fit(large) is _Fit.FITS:
        if probe.fit(usual) is _Fit.FITS and probe.outputs(usual) == probe.outputs(large):
            return usual
        return "its output grows with the image, so that no size is its own"
    side = _only_size(lambda side: probe.fit((channels, side, side)), longest)
    if side is not None:
        return (channels, side, side)
    # A size that the code insists on (an assertion, a table of positions) gives no direction.
    fitting = [n for n in _KNOWN_SIDES if probe.fit((channels, n, n)) is _Fit.FITS]
    if len(fitting) == 1:
        return (channels, fitting[0], fitting[0])
    return f"no square image of up to {longest} pixels goes through ({probe.failure})"


def _takes_any(probe: _Probe, channels: int) -> bool:
    """Whether images of every size go through, so that the usual one is a convention."""
    return probe.fit((channels, _LONGEST[2], _LONGEST[2])) is _Fit.FITS


def _signal_shape(probe: _Probe, channels: int) -> Shape | str:
    """The channels and length of the signal that fits, or why there is none."""
    longest = _LONGEST[1]
    if probe.fit((channels, longest)) is _Fit.FITS:
        return "it accepts signals of any length, and the path-norm may depend on it"
    length = _only_size(lambda length: probe.fit((channels, length)), longest)
    if length is not None:
        return (channels, length)
    return f"no signal of up to {longest} steps goes through ({probe.failure})"


def _only_size(fit: Callable[[int], _Fit], longest: int) -> int | None:
    """The size that a net was made for, among those from 1 to `longest` that fit it.

    The sizes that fit are an interval, found by bisection. Rounding down by a total stride s lets
    s sizes in a row through, and s in a row hold exactly one multiple of s.

    Example:
        >>> def fit(n):
        ...     return _Fit.TOO_SMALL if n < 193 else _Fit.FITS if n <= 224 else _Fit.TOO_LARGE
        >>> _only_size(fit, 1024)
        224
    """
    # Below `low` everything is too small, above `high` everything is too large.
    low, high = 1, longest
    inside = (low + high) // 2
    while (verdict := fit(inside)) is not _Fit.FITS:
        low, high = (inside + 1, high) if verdict is _Fit.TOO_SMALL else (low, inside - 1)
        if low > high:
            return None
        inside = (low + high) // 2
    first, last = inside, inside
    while low < first:
        middle = (low + first) // 2
        low, first = (low, middle) if fit(middle) is _Fit.FITS else (middle + 1, first)
    while last < high:
        middle = (last + high + 1) // 2
        last, high = (middle, high) if fit(middle) is _Fit.FITS else (last, middle - 1)
    stride = last - first + 1
    return last // stride * stride


def _unknown(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"cannot infer the input shape of {type(model).__name__}: {reason}. "
        "Pass it without the batch axis, e.g. input_shape=(3, 224, 224)"
    )
