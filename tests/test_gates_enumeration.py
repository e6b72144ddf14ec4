"""Generalised path-norms and scores against paths listed one by one, gates read off a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpath
from tests.oracles import gated
from tests.oracles.gated import SQUASHES, Edge, Paths
from tests.support.generated import bounded

MAX_PATHS = 3000
MODULES = {"Softshrink": (0.5,), "Hardshrink": (0.5,), "ELU": (1.75,)}
#: Blocks of a network on maps of 2 channels by 3 positions.
BLOCKS = ("convolution", "squeeze", "lstm", "select", "residual", "hard", "nested", "glu")


class Network(nn.Module):
    """Blocks on maps, then a linear map; ``names`` are their activations."""

    def __init__(self, blocks: list[tuple[str, str]], seed: int) -> None:
        super().__init__()
        self.blocks = blocks
        for i, (kind, name) in enumerate(blocks):
            out = 4 if kind == "glu" else 2
            self.add_module(f"conv{i}", nn.Conv1d(2, out, 1 if kind != "convolution" else 2))
            self.add_module(f"other{i}", nn.Conv1d(2, 2, 1, bias=False))
            self.add_module(f"gate{i}", nn.Linear(2, 2))
            self.add_module(f"act{i}", getattr(nn, name)(*MODULES.get(name, ())))
        self.double().eval()
        length = self.features(torch.zeros(1, 2, 3).double()).shape[-1]
        self.head = nn.Linear(2 * length, 1).double()
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for p in self.parameters():
                drawn = rng.uniform(0.3, 1.6, tuple(p.shape)) * rng.choice([-1, 1], tuple(p.shape))
                p.copy_(torch.tensor(drawn * (rng.random(tuple(p.shape)) > 0.1)))

    def part(self, name: str, i: int) -> Any:
        return getattr(self, f"{name}{i}")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))

    def features(self, x: Tensor) -> Tensor:
        for i, (kind, _) in enumerate(self.blocks):
            conv, other, act = self.part("conv", i), self.part("other", i), self.part("act", i)
            gate = self.part("gate", i)
            if kind == "squeeze":
                x = act(conv(x))
                x = x * gate(x.mean(2)).sigmoid()[..., None]
            elif kind == "lstm":
                x = other(x).sigmoid() * conv(x).tanh()
            elif kind == "select":
                a, b = act(conv(x)), other(x)
                weights = torch.stack([gate(a.mean(2)), b.mean(2)]).softmax(0)
                x = (torch.stack([a, b]) * weights[..., None]).sum(0)
            elif kind == "residual":
                x = x + act(conv(x))
            elif kind == "hard":
                x = nn.functional.hardsigmoid(other(x)) * act(conv(x)) * 2
            elif kind == "nested":
                inner = other(x) * gate(x.amax(2)).sigmoid()[..., None]
                x = act(conv(x)) * (inner.sigmoid() - 1.5)
            elif kind == "glu":
                x = nn.functional.glu(conv(x), 1)
            else:
                x = act(conv(x))
        return x


class Expansion:
    """The same network neuron by neuron, by loops over channels and positions."""

    def __init__(self, model: Network) -> None:
        self.net, self.model = Paths(), model
        x = [[self.net.add_input() for _ in range(3)] for _ in range(2)]
        for i, (kind, name) in enumerate(model.blocks):
            x = self.block(kind, name, i, x)
        flat = [v for row in x for v in row]
        self.net.outputs = self.affine("head", [[v] for v in flat])[0]

    def weight(self, name: str, *index: int) -> tuple[float, tuple[str, tuple[int, ...]]]:
        parameter = self.model.get_parameter(name)
        return float(parameter.detach()[index]), (name, index)

    def affine(self, name: str, x: list[list[int]], inside: bool = False) -> list[list[int]]:
        """A linear map or a convolution of channels by positions."""
        module = self.model.get_submodule(name)
        conv = isinstance(module, nn.Conv1d)
        taps = module.kernel_size[0] if conv else 1
        made: list[list[int]] = []
        for o in range(module.weight.shape[0]):
            row = []
            for at in range(len(x[0]) - taps + 1):
                edges: list[Edge] = []
                for c in range(len(x)):
                    for k in range(taps):
                        index = (o, c, k) if conv else (o, c)
                        edges.append((x[c][at + k], *self.weight(f"{name}.weight", *index)))
                bias = None if module.bias is None else self.weight(f"{name}.bias", o)
                row.append(self.net.add(edges, bias=bias, inside=inside))
            made.append(row)
        return made if conv else [[row[0] for row in made]]

    def each(self, x: list[list[int]], **options: Any) -> list[list[int]]:
        return [[self.net.add([(v, 1.0, None)], **options) for v in row] for row in x]

    def squash(self, x: list[list[int]], name: str) -> list[list[int]]:
        function, size = SQUASHES[name]
        return self.each(x, function=function, size=size)

    def means(self, x: list[list[int]]) -> list[list[int]]:
        return [[self.net.add([(v, 1 / len(r), None) for v in r], inside=True)] for r in x]

    def vector(self, name: str, x: list[list[int]]) -> list[list[int]]:
        """A linear map of one number for each channel, inside a gate."""
        return [[v] for v in self.affine(name, x, inside=True)[0]]

    def function(self, x: list[list[int]], function: Any) -> list[list[int]]:
        return self.each(x, function=function, inside=True)

    def gate(self, x: list[list[int]], g: list[list[int]], size: float) -> list[list[int]]:
        return [
            [
                self.net.add(
                    [(v, 1.0, None)], factors=(g[c][at if len(g[c]) > 1 else 0],), size=size
                )
                for at, v in enumerate(row)
            ]
            for c, row in enumerate(x)
        ]

    def block(self, kind: str, name: str, i: int, x: list[list[int]]) -> list[list[int]]:
        sigmoid = gated.sigmoid
        y = self.affine(f"conv{i}", x)
        if kind == "lstm":
            g = self.function(self.affine(f"other{i}", x, inside=True), sigmoid)
            return self.gate(self.squash(y, "Tanh"), g, 1.0)
        if kind == "glu":
            return self.gate(y[:2], self.function(y[2:], sigmoid), 1.0)
        y = self.squash(y, name)
        if kind == "squeeze":
            g = self.function(self.vector(f"gate{i}", self.means(y)), sigmoid)
            return self.gate(y, g, 1.0)
        if kind == "residual":
            return [
                [self.net.add([(u, 1.0, None), (v, 1.0, None)]) for u, v in zip(*rows, strict=True)]
                for rows in zip(x, y, strict=True)
            ]
        if kind == "hard":
            z = self.affine(f"other{i}", x, inside=True)
            g = self.function(z, lambda v: min(max(v + 3, 0.0), 6.0) / 6)
            doubled = self.gate(y, g, 1.0)
            return [[self.net.add([(v, 2.0, None)]) for v in row] for row in doubled]
        if kind == "nested":
            largest = [[self.maximum(row)] for row in x]
            inner = self.function(self.vector(f"gate{i}", largest), sigmoid)
            z = self.affine(f"other{i}", x, inside=True)
            z = [
                [self.net.add([(v, 1.0, None)], factors=(inner[c][0],), inside=True) for v in row]
                for c, row in enumerate(z)
            ]
            return self.gate(y, self.function(z, lambda v: sigmoid(v) - 1.5), 1.5)
        if kind == "select":
            z = self.affine(f"other{i}", x)
            ours, theirs = self.vector(f"gate{i}", self.means(y)), self.means(z)
            result = []
            for c in range(2):
                pair = [(ours[c][0], 1.0, None), (theirs[c][0], -1.0, None)]
                first = self.net.add(pair, function=sigmoid, inside=True)
                flipped = [(s, -w, e) for s, w, e in pair]
                second = self.net.add(flipped, function=sigmoid, inside=True)
                result.append(
                    [
                        self.net.add([(u, 1.0, None), (v, 1.0, None)], factors=(first, second))
                        for u, v in zip(y[c], z[c], strict=True)
                    ]
                )
            return result
        return y

    def maximum(self, row: list[int]) -> int:
        """The largest of some, inside a gate: pairwise a + relu(b - a)."""
        best = row[0]
        for other in row[1:]:
            rise = self.net.add(
                [(other, 1.0, None), (best, -1.0, None)],
                function=lambda v: max(v, 0.0),
                inside=True,
            )
            best = self.net.add([(best, 1.0, None), (rise, 1.0, None)], inside=True)
        return best


@st.composite
def networks(draw: st.DrawFn) -> Network:
    kinds = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3))
    assume(kinds.count("convolution") < 3)
    blocks = [(kind, draw(st.sampled_from(sorted(SQUASHES)))) for kind in kinds]
    return Network(blocks, draw(st.integers(0, 10**6)))


def compare(model: Network) -> None:
    """All that is claimed of a network with gates."""
    net = Expansion(model).net
    paths = net.listed()
    phi = net.phi(paths)
    norm = math.fsum(np.abs(phi))
    for seed in range(2):
        x = np.random.default_rng(seed).normal(size=6) * 10.0**seed
        output = model(torch.tensor(x).reshape(1, 2, 3)).detach().numpy()[0]
        np.testing.assert_allclose(net.forward(x), output, rtol=1e-12, atol=1e-12 * norm)
        matrix = net.activations(paths, x)
        assert np.abs(matrix).max() <= 1 + 1e-15
        found = math.fsum(phi * (matrix @ np.append(x, 1.0)))
        size = max(1.0, float(np.abs(x).max()))
        assert abs(found - output[0]) <= 1e-12 * norm * size
        assert abs(output[0]) <= norm * size * (1 + 1e-12)
    analysis = fxpath.analyze(model, (2, 3), gates=True)
    assert analysis.path_norm == pytest.approx(norm, rel=1e-12)
    for name, shares in analysis.scores.items():
        for index in np.ndindex(*shares.shape):
            lost = norm - math.fsum(np.abs(net.phi(paths, without=(name, index))))
            expected = pytest.approx(lost / norm, rel=1e-9, abs=1e-12)
            assert float(shares[index]) == expected, (name, index)
    reached = {
        entry[0]
        for _, path in paths
        for number, position in path
        if position >= 0 and (entry := net._weight(number, position)[1]) is not None
    }
    assert analysis.scores.keys() == reached
    read = {name for name, _ in model.named_parameters()} - reached
    assert analysis.unscored.keys() == read


@bounded(25)
@given(networks())
def test_paths_listed_one_by_one(model: Network) -> None:
    assume(Expansion(model).net.count() <= MAX_PATHS)
    compare(model)


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_block_by_itself(kind: str) -> None:
    name = sorted(SQUASHES)[BLOCKS.index(kind)]
    compare(Network([(kind, name)], seed=1))


@pytest.mark.parametrize("name", ["SiLU", "SELU", "Hardshrink"])
def test_exponents_and_activations(name: str) -> None:
    model = Network([("convolution", name), ("select", name)], seed=2)
    net = Expansion(model).net
    phi = np.abs(net.phi(net.listed()))
    norms = {q: fxpath.path_norm(model, (2, 3), gates=True, q=q) for q in (0, 2)}
    assert norms[0] == np.count_nonzero(phi)
    assert norms[2] == pytest.approx(math.sqrt(math.fsum(phi**2)), rel=1e-12)


def test_the_comparison_notices_a_gate_that_is_larger_than_it_says() -> None:
    net = Paths()
    x = net.add_input()
    factor = net.add([(x, 1.0, None)], inside=True)
    net.outputs = [net.add([(x, 1.0, None)], factors=(factor,), size=1.0)]
    assert np.abs(net.activations(net.listed(), [3.0])).max() == 3
