"""Random networks of spatial operations in one, two or three dimensions."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


AVG_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


LINEAR = ("linear", "bilinear", "trilinear")


class Dag(nn.Module):
    """A random network of spatial operations in 1, 2 or 3 dimensions; outputs dense or pooled."""

    def __init__(self, dims: int, seed: int, depth: int, head: str) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.dims, self.head = dims, head
        self.plan: list[tuple[str, tuple[int, ...]]] = []
        self.layers = nn.ModuleList()
        kinds = [
            *("conv", "conv", "strided", "transposed", "max", "avg", "up", "nearest", "add"),
            *("cat", "pad", "flip", "clamp", "scale", "along", "slice", "position"),
        ]
        for step in range(depth):
            kind = rng.choice(kinds) if step else "conv"
            read = (rng.randrange(max(0, step - 2), step + 1), rng.randrange(step + 1))
            self.plan.append((kind, read))
            self.layers.append(self._layer(kind, rng))
        if head == "flatten":
            self.last = nn.LazyLinear(2)
        torch.manual_seed(seed)
        with torch.no_grad():
            self(torch.zeros(1, 2, *self.extent))
        self.double()
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1, 1)

    @property
    def extent(self) -> tuple[int, ...]:
        return {1: (13,), 2: (8, 7), 3: (5, 4, 4)}[self.dims]

    def _layer(self, kind: str, rng: random.Random) -> nn.Module:
        d = self.dims - 1
        k, p, dilation = rng.choice([1, 2, 3]), rng.choice([0, 1]), rng.choice([1, 2])
        mode = rng.choice(["zeros", "zeros", "circular", "replicate"])
        if kind == "conv":
            # Five taps wide needs padding where an extent is three.
            p = 1 if mode != "zeros" or (k, dilation) == (3, 2) else p
            return CONV[d](2, 2, k, padding=p, dilation=dilation, padding_mode=mode, groups=1)
        if kind == "strided":
            return CONV[d](2, 2, 3, stride=2, padding=p, groups=rng.choice([1, 2]))
        if kind == "transposed":
            groups = rng.choice([1, 2])
            return TRANSPOSED[d](2, 2, 3, 2, p, output_padding=p, groups=groups)
        if kind == "max":
            return MAX_POOL[d](3, 2, 1, ceil_mode=rng.random() < 0.5)
        if kind == "avg":
            include = rng.random() < 0.5
            return AVG_POOL[d](3, 1, 1, count_include_pad=include)
        if kind == "up":
            align = rng.random() < 0.5
            return nn.Upsample(scale_factor=1.5, mode=LINEAR[d], align_corners=align)
        if kind == "nearest":
            return nn.Upsample(scale_factor=2)
        if kind == "position":
            return nn.ParameterList([torch.empty(2, *self.extent)])
        return nn.ParameterList([torch.empty(2, *[1] * self.dims)])

    def _match(self, x: Tensor, like: Tensor) -> Tensor:
        if x.shape == like.shape:
            return x
        pool = getattr(nn.functional, f"adaptive_avg_pool{self.dims}d")
        result: Tensor = pool(x, like.shape[2:])
        return result

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = [x]
        for (kind, (i, j)), layer in zip(self.plan, self.layers, strict=True):
            a, b = values[i], values[j]
            if min(a.shape[2:]) < 3 or a[0, 0].numel() > 200:
                a = self._match(a, x)  # keep extents in a range where every kernel fits
            if kind == "add":
                a = a + self._match(b, a)
            elif kind == "cat":
                b = self._match(b, a)
                a = torch.cat([a, b], 2)
            elif kind == "pad":
                a = nn.functional.pad(a, [1, 2], value=0.5)
            elif kind == "flip":
                a = a.flip(2).roll(1, 2)
            elif kind == "clamp":
                a = a.clamp(-0.5, 2)
            elif kind == "scale":
                a = nn.functional.leaky_relu(a * layer[0], 1.5)
            elif kind == "along":
                a = torch.maximum(a, a.mean(2, keepdim=True))
            elif kind == "slice":
                a = a[:, :, ::2] if a.shape[2] > 5 else a[:, :, 1:]
            elif kind == "position":
                a = self._match(a, x) + layer[0]
            else:
                a = layer(a)
            values.append(nn.functional.relu(a))
        last = values[-1]
        if self.head == "flatten":
            return self.last(last.flatten(1))  # type: ignore[no-any-return]
        if self.head == "pooled":
            return last.flatten(2).mean(2)
        return last, values[len(values) // 2]
