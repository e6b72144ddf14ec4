"""Operations that only move values: padding, cutting, joining, reshaping, reordering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import Call, affine, clamp, homogeneous, maximum

pad = functional.pad
INF = float("inf")
BRIEF = ("spatial",)
BARE: dict[str, Any] = {"layouts": ("bare",)}
C1, C2, C3 = (2, 5), (2, 4, 5), (2, 3, 4, 3)  # channels and 1, 2, 3 axes

PADS = [
    case("zero1d", C1, affine(nn.ZeroPad1d((1, 2)))),
    case("zero2d", C2, affine(nn.ZeroPad2d((1, 0, 2, 1)))),
    case("zero3d", C3, affine(nn.ZeroPad3d((1, 0, 0, 1, 2, 1)))),
    case("constant1d", C1, affine(nn.ConstantPad1d((2, 1), 1.3))),
    case("constant2d", C2, affine(nn.ConstantPad2d((0, 1, 2, 1), -0.6))),
    case("constant3d", C3, affine(nn.ConstantPad3d((1, 0, 0, 1, 1, 1), 2.0))),
    case("constant-at-the-input", C2, affine(nn.ConstantPad2d(1, 3.0)), **BARE),
    case("reflect1d", C1, affine(nn.ReflectionPad1d((3, 1)))),
    case("reflect2d", C2, affine(nn.ReflectionPad2d((1, 2, 0, 3)))),
    case("reflect3d", C3, affine(nn.ReflectionPad3d((1, 2, 0, 1, 2, 1)))),
    case("replicate1d", C1, affine(nn.ReplicationPad1d((3, 6)))),
    case("replicate2d", C2, affine(nn.ReplicationPad2d((1, 2, 0, 6)))),
    case("replicate3d", C3, affine(nn.ReplicationPad3d((1, 2, 0, 1, 4, 1)))),
    case("circular1d", C1, affine(nn.CircularPad1d((3, 5)))),
    case("circular2d", C2, affine(nn.CircularPad2d((1, 2, 0, 4)))),
    case("circular3d", C3, affine(nn.CircularPad3d((1, 2, 0, 1, 2, 1)))),
    case("functional", C2, affine(lambda x: pad(x, (1, 2)))),
    case("functional-constant", C2, affine(lambda x: pad(x, (1, 2, 0, 1), "constant", -3.1))),
    case("functional-reflect", C2, affine(lambda x: pad(x, (1, 2, 0, 1), mode="reflect"))),
    case("functional-replicate", C1, affine(lambda x: pad(x, (1, 2), mode="replicate"))),
    case("functional-circular", C3, affine(lambda x: pad(x, (1, 2, 0, 1, 0, 2), mode="circular"))),
    case("nothing", C2, affine(lambda x: pad(x, (0, 0, 0, 0), value=2.0))),
    # A negative amount crops, also next to a positive one.
    case("crop", C2, affine(lambda x: pad(x, (-1, -2)))),
    case("crop-and-pad", C2, affine(lambda x: pad(x, (-1, 2, 3, -2), value=1.7))),
    case("crop-module", C1, affine(nn.ConstantPad1d((-2, 1), 2.0))),
    case("crop-reflect", C2, affine(lambda x: pad(x, (-1, 2, 1, -1), mode="reflect"))),
    case("crop-replicate", C1, affine(lambda x: pad(x, (2, -1), mode="replicate"))),
    case("crop-circular", C2, affine(lambda x: pad(x, (-1, 2, 0, 0), mode="circular"))),
    case("crop-everything", C1, affine(lambda x: pad(x, (-5, 2), value=1.7))),
    case("channels", C2, affine(lambda x: pad(x, (0, 0, 0, 0, 1, 2)))),
    case("channels-constant", C1, affine(lambda x: pad(x, (1, 0, 2, 1), value=0.5))),
    case("channels-cropped", (4, 5), affine(lambda x: pad(x, (0, 0, -1, -1)))),
    case("flat", (5,), affine(lambda x: pad(x, (1, 2), value=-1.0))),
    case("twice", C1, affine(nn.ConstantPad1d(1, 1.0)), affine(nn.ConstantPad1d(1, 2.0))),
    case("constant-then-max", C2, affine(nn.ConstantPad2d(1, 2.0)), maximum(nn.MaxPool2d(2, 1))),
    # Minus infinity is no edge where only a max-pool reads it.
    case(
        "infinite-then-max1d",
        C1,
        maximum(lambda x: functional.max_pool1d(pad(x, (1, 2), value=-INF), 3, 1)),
    ),
    case(
        "infinite-then-max2d",
        C2,
        maximum(lambda x: functional.max_pool2d(pad(x, (0, 1, 0, 1), value=-INF), 3, 2)),
    ),
    case(
        "infinite-then-max3d",
        C3,
        maximum(lambda x: functional.max_pool3d(pad(x, (1, 0, 1, 0, 0, 1), value=-INF), 2, 1)),
    ),
    case(
        "infinite-modules",
        C2,
        maximum(nn.Sequential(nn.ConstantPad2d(1, -INF), nn.MaxPool2d(3, 1, 1))),
    ),
]

THREE = [(2, 4), (3, 4), (1, 4)]
JOINS = [
    case("cat-channels", THREE, affine(lambda *x: torch.cat(x, 1))),
    case("cat-last", [(2, 4), (2, 1)], affine(lambda *x: torch.cat(x, -1))),
    case("cat-rows", [(2, 4, 3), (2, 1, 3)], affine(lambda *x: torch.cat(x, 2))),
    case("cat-columns", [(2, 3, 3), (2, 3, 1)], affine(lambda *x: torch.cat(x, dim=3))),
    case("cat-3d", [(2, 2, 3, 1), (2, 2, 3, 2)], affine(lambda *x: torch.cat(x, 4))),
    case("cat-flat", [(2,), (3,)], affine(lambda *x: torch.cat(x, 1))),
    case("cat-itself", (2, 4), affine(lambda x, y: torch.cat([x, y], 2), reads=(0, 0))),
    case(
        "cat-constant", (2, 4), affine(lambda x: torch.cat([x, torch.ones(len(x), 1, 4).to(x)], 1))
    ),
    case(
        "cat-parameter",
        (2, 4),
        affine(Call(lambda x, p: torch.cat([p, x], 2), p=(1, 2, 3)), single=True),
    ),
    case("concat", THREE, affine(lambda *x: torch.concat(x, 1))),
    case("hstack", THREE, affine(lambda *x: torch.hstack(x))),
    case("stack-front", [(2, 4)] * 2, affine(lambda *x: torch.stack(x, 1))),
    case("stack-middle", [(2, 4)] * 3, affine(lambda *x: torch.stack(x, 2))),
    case("stack-back", [(2, 4)] * 2, affine(lambda *x: torch.stack(x, -1))),
    case("stack-2d", [(2, 3, 3)] * 2, affine(lambda *x: torch.stack(x, 2))),
    case(
        "stack-then-max",
        [(2, 4)] * 3,
        affine(lambda *x: torch.stack(x, 1)),
        maximum(lambda x: x.amax(1)),
    ),
]

SHAPE = (4, 5)
IMAGE = (4, 4, 6)
CUTS = {
    "split": lambda x: x.split(2, 1),
    "split-uneven": lambda x: torch.split(x, 2, 2),
    "split-sizes": lambda x: x.split([1, 3], dim=1),
    "chunk": lambda x: x.chunk(2, 1),
    "chunk-uneven": lambda x: torch.chunk(x, 3, dim=-1),
    "chunk-one": lambda x: x.chunk(3, 1)[1],
    "tensor-split": lambda x: x.tensor_split(3, 2),
    "unbind": lambda x: x.unbind(1),
    "unbind-last": lambda x: torch.unbind(x, -1),
    "slice": lambda x: x[:, 1:3],
    "slice-step": lambda x: x[:, :, ::2],
    "slice-offset-step": lambda x: x[:, :, 1:5:3],
    "slice-negative": lambda x: x[:, -3:-1],
    "slice-beyond": lambda x: x[:, :, 2:100],
    "slice-ellipsis": lambda x: x[..., 1:],
    "slice-both": lambda x: x[:, 1::2, :-1],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "select": lambda x: x[:, 2],
    "select-negative": lambda x: x[:, :, -2],
    "select-method": lambda x: x.select(1, 0),
    "select-keepdim": lambda x: x[:, 1:2],
    "select-and-slice": lambda x: x[:, 3, 1:4],
    "new-axis": lambda x: x[:, None, 1:],
    "index-list": lambda x: x[:, [2, 0, 2]],
    "index-list-last": lambda x: x[..., [4, 1]],
    "index-tensor": lambda x: x[:, torch.tensor([3, 1])],
    "index-two": lambda x: x[:, [0, 1, 3], [4, 2, 2]],
    "index-mask": lambda x: x[:, torch.tensor([True, False, True, True])],
    "index-select": lambda x: torch.index_select(x, 1, torch.tensor([1, 3, 3])),
    "index-select-last": lambda x: x.index_select(-1, torch.tensor([4, 0])),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "unfold-method": lambda x: x.unfold(2, 3, 1),
    "gather": lambda x: x.gather(2, torch.tensor([[[0], [3], [2], [2]]]).expand(len(x), -1, -1)),
    "as-strided": lambda x: x.contiguous().as_strided((len(x), 5), (20, 1), 5),
    "triangle": lambda x: x.tril(),
}
MOVES = {
    "view": lambda x: x.view(-1, 4, 3, 8),
    "view-flat": lambda x: x.view(x.size(0), -1),
    "view-across": lambda x: x.view(x.shape[0], 8, 12),
    "reshape": lambda x: x.reshape(-1, 6, 4, 4),
    "reshape-after-transpose": lambda x: x.transpose(1, 3).reshape(x.shape[0], -1, 4),
    "reshape-as": lambda x: x.reshape_as(torch.zeros(len(x), 8, 12)),
    "flatten": lambda x: x.flatten(1),
    "flatten-two": lambda x: torch.flatten(x, 2),
    "flatten-channels": lambda x: x.flatten(1, 2),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "unflatten-minus-one": lambda x: x.unflatten(-1, (3, -1)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute-negative": lambda x: torch.permute(x, (0, -1, -3, -2)),
    "permute-batch-and-back": lambda x: (x.permute(3, 1, 0, 2) * 1).permute(2, 1, 3, 0),
    "transpose": lambda x: x.transpose(1, 2),
    "transpose-last": lambda x: x.transpose(-1, -2),
    "swapaxes": lambda x: x.swapaxes(1, 3),
    "matrix-transpose": lambda x: x.mT,
    "movedim": lambda x: x.movedim(1, -1),
    "movedim-two": lambda x: torch.movedim(x, (1, 2), (2, 3)),
    "moveaxis": lambda x: torch.moveaxis(x, 3, 1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "squeeze-several": lambda x: x[:, :1, :, :1].squeeze((1, 3)),
    "squeeze-nothing": lambda x: x.squeeze(2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "unsqueeze-last": lambda x: x.unsqueeze(-1),
    "roll": lambda x: x.roll(1, 1),
    "roll-negative": lambda x: torch.roll(x, -2, -1),
    "roll-two": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "roll-far": lambda x: torch.roll(x, 11, 2),
    "flip": lambda x: x.flip(1),
    "flip-two": lambda x: torch.flip(x, (2, -1)),
    "flip-left-right": lambda x: x.rot90(2, (2, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "expand-new-axis": lambda x: x[:, None, :, 0].expand(-1, 2, -1, -1),
    "expand-as": lambda x: x[..., :1].expand_as(x),
    "broadcast-to": lambda x: x[:, :, :1].broadcast_to(x.shape),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat-new-axis": lambda x: x[:, :, 0].repeat(1, 1, 2),
    "tile": lambda x: x.tile((2, 1)),
    "repeat-interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat-interleave-last": lambda x: torch.repeat_interleave(x, 3, dim=-1),
    "pixel-shuffle": nn.PixelShuffle(2),
    "pixel-unshuffle": nn.PixelUnshuffle(2),
    "pixel-functional": lambda x: functional.pixel_shuffle(functional.pixel_unshuffle(x, 2), 4),
    "channel-shuffle": nn.ChannelShuffle(2),
    "channel-shuffle-by-hand": lambda x: x.view(-1, 2, 2, 4, 6).transpose(1, 2).flatten(1, 2),
    "space-to-depth": lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1),
    "fold": lambda x: functional.fold(x.view(-1, 16, 6), (3, 4), (2, 2)),
    "unfold": lambda x: functional.unfold(x, 2, padding=1),
    "cumsum": lambda x: x.cumsum(2),
    "contiguous-view": lambda x: x.permute(0, 2, 1, 3).contiguous().view(-1, 4, 24),
}
# Not in the table of rules, but right answers are welcome.
RARE = {"tensor-split", "index-two", "index-mask", "diagonal", "unfold-method", "gather"}
RARE |= {"as-strided", "triangle", "rot90", "flip-left-right", "fold", "unfold", "cumsum"}
RARE |= {"tile", "repeat-interleave", "repeat-interleave-last", "reshape-as"}

BATCH_OF_ONE = {
    "squeeze-batch": lambda x: (x.squeeze(0) * 2).unsqueeze(0),
    "select-batch": lambda x: torch.stack([x[0]], 0),
    "roll-flat": lambda x: x.roll(3),
    "unbatched-conv": lambda x: functional.conv1d(x[0], torch.ones(2, 4, 2).to(x))[None],
    "batch-as-length": lambda x: x.permute(2, 1, 0).reshape(1, 4, -1),
}


def _items(table: dict[str, Any], shape: tuple[int, ...]) -> list[Case]:
    rare: dict[str, Any] = {"layouts": BRIEF}
    return [
        case(name, shape, affine(op), **(rare if name in RARE else {}))
        for name, op in table.items()
    ]


@pytest.mark.parametrize(("item", "layout"), parameters(PADS))
def test_padding(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(JOINS))
def test_joining(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(_items(CUTS, SHAPE)))
def test_cutting(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(_items(MOVES, IMAGE)))
def test_moving(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(
    ("item", "layout"),
    parameters(case(name, SHAPE, affine(op, single=True)) for name, op in BATCH_OF_ONE.items()),
)
def test_batch_of_one(item: Case, layout: str) -> None:
    """What is only right for the batch of one that an analysis uses."""
    check(item, layout)


def _zero_first(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def _constant_rows(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3] = 1.7
    return y


def _copy_row(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = y[:, 1]
    return y


def _add_to_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 1:3] += 1
    return y


def _scale_select(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2].mul_(-2.0)
    return y


def _add_to_view(x: Tensor) -> Tensor:
    x.view(-1).add_(1.3)
    return x


def _scale_through_transpose(x: Tensor) -> Tensor:
    x.transpose(1, 2)[:, 0].mul_(3.0)
    return x


def _both_names(x: Tensor) -> Tensor:
    y = x.mul_(2)
    return torch.cat([x, y], 1)


def _view_taken_before(x: Tensor) -> Tensor:
    y = x[:, :2]
    x.add_(1.0).mul_(3.0)
    return torch.cat([x, y], 1)


def _slice_of_a_slice(x: Tensor) -> Tensor:
    x[:, 1:][:, :, ::2].mul_(-3.0)
    return x


def _fill(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def _copy(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.copy_(x)
    return y * 2


def _index_put(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, [0, 2]] = 3.0
    return y


def _shift(x: Tensor) -> Tensor:
    """The temporal shift of some video networks: slices written into zeros."""
    y = torch.zeros_like(x)
    y[:, :2, 1:] = x[:, :2, :-1]
    y[:, 2:] = x[:, 2:]
    return y


def _relu_slice(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1].relu_()
    return y


def _leaky_slice(x: Tensor) -> Tensor:
    functional.leaky_relu_(x[:, 1:], 3.0)
    return x


def _clamp_slice(x: Tensor) -> Tensor:
    functional.hardtanh_(x.view(-1, 20), -2.0, 3.0)
    return x


IN_PLACE_AFFINE = (
    *(_zero_first, _constant_rows, _copy_row, _add_to_slice, _scale_select, _add_to_view),
    *(_scale_through_transpose, _view_taken_before, _slice_of_a_slice, _fill, _copy),
    *(_index_put, _shift),
)
IN_PLACE = [
    *(
        case(op.__name__[1:].replace("_", "-"), SHAPE, affine(op), layouts=BRIEF)
        for op in IN_PLACE_AFFINE
    ),
    case("both-names", SHAPE, affine(_both_names)),
    case("view-taken-before-positions", (2, 3), affine(_view_taken_before)),
    case("relu-slice", SHAPE, homogeneous(_relu_slice), layouts=BRIEF),
    case("leaky-slice", SHAPE, homogeneous(_leaky_slice)),
    case("clamp-slice", SHAPE, clamp(_clamp_slice), layouts=BRIEF),
]


@pytest.mark.parametrize(("item", "layout"), parameters(IN_PLACE))
def test_in_place_on_views(item: Case, layout: str) -> None:
    """An operation in place on a view changes its base: right, never ignored."""
    check(item, layout)
