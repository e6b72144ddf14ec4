"""What is computed edge by edge, against the same found in other ways, on every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from fxpath.model import Given
from fxpath.pairs.difference import Difference
from fxpath.pairs.domination import find_domination
from fxpath.pairs.matching import make_pair
from fxpath.pairs.normalized import Normalized
from fxpath.pairs.unrolled import Network, Part
from tests.support.nets import randomize


class Net(nn.Module):
    """A function of an image with parameters of its own."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **parameters: object) -> None:
        super().__init__()
        self.run = run
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


IMAGE, LINE = (2, 6, 7), (2, 9)
NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "transposed": (
        IMAGE,
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 2, 2, stride=3, dilation=2, padding=1),
        ),
    ),
    "reflected": (
        IMAGE,
        lambda: nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(3, 1, 3, padding=1, padding_mode="circular"), nn.AvgPool2d(3, padding=1),
        ),
    ),
    "pooled output": (
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 3, 1),
            nn.AdaptiveAvgPool2d(2),
        ),
    ),
    "bilinear": (
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3), nn.LeakyReLU(0.1), nn.UpsamplingBilinear2d(size=(9, 5)),
            nn.Conv2d(2, 2, 3, groups=2), nn.ReLU6(),
        ),
    ),
    "three axes": (
        (1, 4, 5, 4),
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten()),
    ),
    # Small and padded: the reduction keeps the first convolution whole.
    "kept whole": (
        (2, 5, 5),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 1, 3)),
    ),
    "batch norm apart": (
        LINE,
        lambda: nn.Sequential(
            nn.BatchNorm1d(2), nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(3),
            nn.Flatten(), nn.Linear(27, 2),
        ),
    ),
    "products": (
        LINE,
        lambda: Net(
            lambda m, x: torch.einsum(
                "bij,jk->bik", torch.relu(m.left @ torch.relu(x) @ m.right), m.tensor
            )
            + m.shift,
            left=weight(3, 2),
            right=weight(9, 4),
            tensor=weight(4, 2),
            shift=weight(3, 1),
        ),
    ),
    "batched products": (
        LINE,
        lambda: Net(
            lambda m, x: torch.einsum(
                "...cl,cld->...d",
                torch.relu(x.unsqueeze(-1) * m.each).transpose(1, 2).matmul(m.batch).sum(2),
                m.tensor,
            ),
            each=weight(1, 2, 9, 3),
            batch=weight(9, 3, 4),
            tensor=weight(9, 4, 2),
        ),
    ),
    "joined": (
        IMAGE,
        lambda: Net(
            lambda m, x: m.head(
                torch.cat([F.pad(m.one(x), (1, 1, 1, 1), value=0.5), m.two(x).clamp(-1, 0.5)], 1)
                + torch.maximum(m.two(x), m.three(x))[:, :1]
            ).flatten(2).mean(-1),
            one=nn.Conv2d(2, 2, 3),
            two=nn.Conv2d(2, 2, 1),
            three=nn.Conv2d(2, 2, 1),
            head=nn.Conv2d(4, 3, 2),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.parametrize("close", [True, False])
def test_edges_one_by_one(name: str, close: bool) -> None:
    shape, make = NETS[name]
    torch.manual_seed(0)
    model = randomize(make(), weights=True).eval().double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            factor = torch.rand_like(parameter)
            parameter.mul_(factor + 0.6 if close else factor * (factor > 0.2))
    pair = make_pair(model, other, Given(shape))
    parts = [Part(), Part(biases=False)]
    networks = [Network.whole(pair.lifted), Network.by_value(pair.lifted, pair.setting)]

    # The same at full resolution as with equal positions merged.
    whole, merged = (Normalized(network, pair, parts).outcome() for network in networks)
    norms = fxpath.path_metric(model, other, shape)
    for found in (whole, merged):
        assert found.norms[0] == pytest.approx(norms.path_norm, rel=1e-9)
        assert found.norms[1] == pytest.approx(norms.other_path_norm, rel=1e-9)
    for one, two in zip(whole.common, merged.common, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert whole.distance == pytest.approx(merged.distance, rel=1e-9)
    assert whole.change == pytest.approx(merged.change, rel=1e-9)

    ends = [Difference(pair.lifted, pair, biases=biases).outcome() for biases in (True, False)]
    exact = [torch.cat([y.gap().flatten() for y in outputs]) for outputs in ends]
    if norms.exact:
        for network in networks:
            carried = find_domination(network, pair, parts, [False, False])
            assert carried.holds
            for gap, expected, bound in zip(carried.gap, exact, whole.common, strict=True):
                torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-12)
                assert bool((bound >= expected * (1 - 1e-9) - 1e-12).all())
    assert norms.exact == (not close) or "batch norm" in name


def test_what_a_fixed_factor_with_a_bias_reads_is_no_output() -> None:
    """The factor as a fixed matrix is the same network, neuron by neuron."""
    found = []
    for factor in (torch.tensor([3.0]), 3 * torch.eye(3)):
        model = Net(
            lambda m, x: (
                (torch.relu(m.body(x)) @ m.factor if m.factor.dim() > 1 else m.body(x).relu() * 3)
                + m.shift
            ),
            body=nn.Linear(4, 3),
            shift=weight(3),
        )
        model.register_buffer("factor", factor)
        other = copy.deepcopy(randomize(model.double(), weights=True))
        with torch.no_grad():
            other.body.weight.mul_(0.7)
        pair = make_pair(model, other, Given((4,)))
        found.append(Normalized(Network.whole(pair.lifted), pair, [Part()]).outcome())
    scaled, twin = found
    assert scaled.norms == pytest.approx(twin.norms)
    assert scaled.change == pytest.approx(twin.change)
    assert scaled.through_common == pytest.approx(twin.through_common)


@pytest.mark.parametrize(
    "end",
    [
        lambda m, x: -(x @ m.weight) + m.shift,
        lambda m, x: (x @ m.weight + m.shift).clamp(max=0),
        lambda m, x: (x @ m.weight).clamp(max=0).abs() + m.shift,
    ],
    ids=["negated", "bounded by zero", "both"],
)
def test_what_path_mass_ignores_does_not_make_neurons(end: Callable[..., torch.Tensor]) -> None:
    def bound(forward: Callable[..., torch.Tensor]) -> dict[str, float]:
        torch.manual_seed(0)
        model = Net(forward, weight=weight(3, 4), shift=weight(4)).double()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        return dict(fxpath.path_metric(model, other, (3,)).bounds)

    plain = bound(lambda m, x: x @ m.weight + m.shift)
    assert bound(end) == pytest.approx(plain, rel=1e-12)
