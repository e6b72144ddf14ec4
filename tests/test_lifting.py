"""The listed path-lifting against the tests' own oracle and the identities of Def. A.5.

The oracle (`oracles/networks.py`) wires its graph from a description of the network by loops; what
is tested here reads its graph off the captured operations.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch.nn.utils import prune

import fxpath
from fxpath.graph.realization import realization
from fxpath.model import Given
from fxpath.passes import take_in
from tests.oracles.networks import Net
from tests.support.generated import bounded, nets
from tests.support.nets import randomize

MAX_PATHS = 3000


def table(
    phi: np.ndarray, activity: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Non-zero entries of Phi with their activation, first and last neuron, in a fixed order."""
    kept = phi != 0
    rows = np.stack([phi.round(9), activity, starts, ends], 1)[kept] + 0.0
    return rows[np.lexsort(rows.T)]


@given(nets(reuse=True))
@bounded(30)
def test_phi_and_activations_equal_the_oracle(net: Net) -> None:
    module = net.module()
    dag = net.dag(module)
    assume(dag.count_paths() <= MAX_PATHS)
    generator = torch.Generator().manual_seed(net.seed)
    x = [torch.randn(s, generator=generator, dtype=torch.float64) for s in net.input_shapes]
    lifting = fxpath.path_lifting(module, x=x)
    matrix = dag.activations(torch.cat([each.flatten() for each in x]).tolist())
    expected = table(dag.phi(), matrix.sum(1), matrix.argmax(1), dag.ends())
    # A path without activation has no column of its own in the oracle's matrix.
    active = expected[expected[:, 1] != 0]
    assert lifting.activity is not None
    found = table(
        *(v.numpy() for v in (lifting.phi, lifting.activity, lifting.starts)),
        lifting.outputs.numpy(),
    )
    np.testing.assert_allclose(found[found[:, 1] != 0], active, atol=1e-8)
    np.testing.assert_allclose(np.sort(found[:, 0]), np.sort(expected[:, 0]), atol=1e-8)


@given(nets(reuse=True))
@bounded(20)
def test_identity_4_and_the_path_norm(net: Net) -> None:
    module = net.module()
    assume(net.dag(module).count_paths() <= MAX_PATHS)
    x = [torch.randn(s, dtype=torch.float64) for s in net.input_shapes]
    lifting = fxpath.path_lifting(module, x=x)
    outputs = module(*[each[None] for each in x])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = torch.cat([each.flatten() for each in outputs]).detach()
    scale = max(1.0, lifting.phi.abs().sum().item())
    torch.testing.assert_close(lifting.realization(), expected, rtol=1e-10, atol=1e-12 * scale)
    extended = torch.cat([*[each.flatten() for each in x], torch.ones(1, dtype=torch.float64)])
    terms = lifting.phi * (lifting.activations @ extended)
    by_hand = torch.stack([terms[lifting.outputs == o].sum() for o in range(len(expected))])
    torch.testing.assert_close(by_hand, expected, rtol=1e-10, atol=1e-12 * scale)
    norms = fxpath.path_norms(module, list(net.input_shapes), q=(1, 0))
    assert lifting.phi.abs().sum().item() == pytest.approx(norms[1], rel=1e-10)
    assert (lifting.phi != 0).sum().item() == round(norms[0])


# Operations that the oracle does not have


class Everything(nn.Module):
    """Clamps, slopes, absolute values, moves and constants in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4)
        self.slopes = nn.PReLU(2)
        self.second = nn.Conv1d(2, 2, 2, padding=1, padding_mode="circular")
        self.transposed = nn.ConvTranspose1d(2, 1, 2, stride=2)
        self.offset = nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(torch.relu(self.first(x))) / 3
        y = self.slopes(y.reshape(-1, 2, 2) - self.offset[:, None])
        z = torch.nn.functional.hardtanh(self.second(y), -0.7, 0.4)
        z = torch.cat([z, 1.7 * torch.nn.functional.relu6(y).flip(2)], 2).transpose(1, 2)
        z = torch.nn.functional.leaky_relu(z, -1.3).abs().permute(0, 2, 1)
        z = torch.maximum(self.transposed(z), -z.sum(1, keepdim=True).repeat(1, 1, 2)[..., :10])
        return torch.nn.functional.pad(z, (1, 1), value=0.3).amax(2), z.clamp(min=0.1).mean(2)


def everything() -> Everything:
    model = Everything().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.slopes.weight.copy_(torch.tensor([0.3, -1.7]))
    return model


@pytest.mark.parametrize("seed", range(5))
def test_identity_4_on_operations_of_all_kinds(seed: int) -> None:
    torch.manual_seed(seed)
    model = everything()
    x = 2 * torch.randn(2, dtype=torch.float64)
    lifting = fxpath.path_lifting(model, x=x)
    expected = torch.cat([y.flatten() for y in model(x[None])]).detach()
    torch.testing.assert_close(lifting.realization(), expected, rtol=1e-10, atol=1e-10)
    norm = fxpath.path_norm(model, (2,))
    assert lifting.phi.abs().sum().item() == pytest.approx(norm, rel=1e-12)
    assert lifting.activity is not None and lifting.activity.abs().max() <= 1


class Contractions(nn.Module):
    """Weights that meet activations in every way, one of them twice and one without an axis."""

    shape = (2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3, 2))
        self.v = nn.Parameter(torch.randn(2, 2))
        self.b = nn.Parameter(torch.randn(2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.einsum("bij,kjl->bik", x, self.w).relu()
        y = torch.baddbmm(self.b[None], self.v[None], y, beta=0.5, alpha=-2.0)
        return y @ self.v, torch.addmv(self.b[:, 0], y[0], self.v[1])


class Convolutions(nn.Module):
    """Grouped, dilated, transposed, padded on one side, by reflection or around."""

    shape = (2, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 2, padding=1, groups=2)
        self.second = nn.ConvTranspose2d(2, 2, 2, 2, 1, output_padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.third = nn.Conv2d(2, 1, (2, 1), dilation=2, padding=(0, 1), padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x), 2, 1)
        x = nn.functional.relu(self.norm(self.second(x)))
        return nn.functional.avg_pool2d(self.third(x), 2, 2, padding=1)


class Ranks(nn.Module):
    """Neurons of every rank, tied entries among what they read."""

    shape = (3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(x)
        smallest = x.amin(1, keepdim=True)
        x = torch.cat([x, smallest, torch.minimum(x[:, :1], x[:, 1:2])], 1)
        return (
            x.sort(1).values[:, 1],
            x.topk(2, 1, largest=False).values,
            x.median(1).values,
            torch.tril(x.kthvalue(2, 1, keepdim=True).values + smallest),
        )


class Positions(nn.Module):
    """Entries that are picked, added up, overwritten and masked."""

    shape = (4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.filling = nn.Parameter(torch.randn(2))
        self.register_buffer("places", torch.tensor([1, 0, 1, 3]))
        self.register_buffer("mask", torch.tensor([True, False, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)[:, [2, 0, 2, 3]]
        y = torch.zeros_like(x).index_add(1, self.places, x.relu())
        y[:, 1] = x[:, 3] - 2 * x[:, 2]
        y = torch.where(self.mask[:, None], y, self.filling)
        return torch.cumsum(y, 1).roll(1, 2) + y.gather(1, self.places[None, :, None].expand_as(y))


class Resampling(nn.Module):
    """Fixed maps, with coefficients of any sign, along two axes."""

    shape = (1, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(x)
        y = nn.functional.interpolate(x, scale_factor=1.5, mode="bicubic")
        z = nn.functional.interpolate(x, (3, 4), mode="bilinear", align_corners=True)
        return y.abs(), nn.functional.adaptive_avg_pool2d(-z, (2, 3)), nn.functional.unfold(x, 2)


class Clipping(nn.Module):
    """Clamps of every kind, bounds that meet or cross, slopes and signs."""

    shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 1.0, -1.0]))
        self.top = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(x)
        return (
            nn.functional.hardsigmoid(x) - nn.functional.threshold(x, 0.5, 0.5),
            torch.minimum(x.copysign(self.signs), self.top),
            x.clamp(0.5, 0.5) + x.clamp(1.0, -1.0) + x.clamp(max=-0.25),
        )


class Recurrent(nn.Module):
    shape = (3, 2)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 2, nonlinearity="relu", batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


KINDS = [Contractions, Convolutions, Ranks, Positions, Resampling, Clipping, Recurrent]


@pytest.mark.parametrize("kind", KINDS)
def test_what_analyze_knows_is_listed_and_run(kind: Any) -> None:
    torch.manual_seed(3)
    model = randomize(kind()).double().eval()
    captured, lifted = take_in(model, Given(kind.shape))
    run = realization(lifted, captured.live())
    some = 2 * torch.randn(kind.shape, dtype=torch.float64)
    for x in (some, some.round()):  # the second one has ties
        outputs = model(x[None])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        expected = torch.cat([y.flatten() for y in outputs]).detach()
        lifting = fxpath.path_lifting(model, x=x)
        torch.testing.assert_close(lifting.realization(), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(run([x[None]]), expected, rtol=1e-9, atol=1e-9)
    for q, norm in fxpath.path_norms(model, kind.shape, q=(0, 0.5, 1, 2)).items():
        mass = lifting.phi[lifting.phi != 0].abs().pow(q).sum().item()
        assert (mass ** (1 / q) if q else mass) == pytest.approx(norm, rel=1e-9)
    if kind in (Contractions, Recurrent):
        return  # weights that are used twice on a path count twice in (14)
    for name, magnitude in fxpath.path_magnitude(model, kind.shape).items():
        for index in np.ndindex(*magnitude.shape):
            mass = lifting.phi[lifting.through(name, index)].abs().sum().item()
            assert mass == pytest.approx(magnitude[index].item(), rel=1e-9), (name, index)


# Single entries


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).double()


def test_an_entry_set_to_zero_loses_its_path_magnitude() -> None:
    model = small().eval()
    model[1].running_mean.fill_(0.5)
    lifting = fxpath.path_lifting(model, (1, 4, 4))
    for name, scores in fxpath.path_magnitude(model, (1, 4, 4)).items():
        if name == "1.bias":  # of the folded bias: no parameter by itself
            continue
        for index in [tuple(0 for _ in scores.shape), tuple(n - 1 for n in scores.shape)]:
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.get_parameter(name)[index] = 0
            without = fxpath.path_lifting(changed, (1, 4, 4)).phi
            lost = (lifting.phi - without).abs().sum().item()
            assert lost == pytest.approx(scores[index].item(), rel=1e-12)
            assert lost == pytest.approx(
                lifting.phi[lifting.through(name, index)].abs().sum().item(), rel=1e-12
            )


def test_folded_biases_are_entries_too() -> None:
    model = small().eval()
    model[1].running_mean.fill_(0.5)
    lifting = fxpath.path_lifting(model, (1, 4, 4))
    scores = fxpath.path_magnitude(model, (1, 4, 4))["1.bias"]
    for channel in range(2):
        mass = lifting.phi[lifting.through("1.bias", [channel])].abs().sum().item()
        assert mass == pytest.approx(scores[channel].item(), rel=1e-12)


def test_zero_weights_keep_their_paths() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    full = fxpath.path_lifting(model, (2,))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].bias[0] = 0
    pruned = fxpath.path_lifting(model, (2,))
    assert len(full) == len(pruned) == 2 * 3 * 2 + 3 * 2 + 2
    assert (pruned.phi != 0).sum() == round(fxpath.path_norm(model, (2,), q=0)) < len(full)
    assert [str(full.path(i)) for i in range(len(full))] == [
        str(pruned.path(i)) for i in range(len(full))
    ]


def test_masks_and_computed_weights_are_effective_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    prune.random_unstructured(model[0], "weight", amount=3)
    lifting = fxpath.path_lifting(model, (2,))
    assert lifting.phi.abs().sum().item() == pytest.approx(fxpath.path_norm(model, (2,)), rel=1e-6)
    assert len(lifting) == 2 * 3 + 3 + 1
    assert lifting.path(len(lifting) - 1).entries[0][0] == "0.weight"


def test_a_path_reads_as_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    lifting = fxpath.path_lifting(model)
    paths = [lifting.path(i) for i in range(len(lifting))]
    longest = next(p for p in paths if p.entries[0] == ("0.weight", (1, 0)))
    assert longest.entries == (("0.weight", (1, 0)), ("2.weight", (0, 1)))
    assert longest.neurons[0].startswith("input")
    assert longest.neurons[1:] == ("linear[1]", "relu[1]", "linear_1[0]")
    assert longest.output == 0
    biased = next(p for p in paths if p.entries[0] == ("0.bias", (1,)))
    assert biased.neurons == ("linear[1]", "relu[1]", "linear_1[0]")
    assert {p.entries for p in paths} == {
        *(((("0.weight", (j, i))), ("2.weight", (0, j))) for i in range(2) for j in range(2)),
        *(((("0.bias", (j,))), ("2.weight", (0, j))) for j in range(2)),
    }


# Refusals


def test_too_many_paths_are_refused_with_their_number() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 5))
    count = 10 * 20 * 20 * 5 + 20 * 20 * 5 + 20 * 5 + 5
    with pytest.raises(ValueError, match=rf"{count:,} paths, more than limit=22,104"):
        fxpath.path_lifting(model, limit=count - 1)
    assert len(fxpath.path_lifting(model, limit=count)) == count


def test_a_large_network_is_refused_before_it_is_expanded() -> None:
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(200)])
    with pytest.raises(ValueError, match=r"has about 10\^402 paths, more than limit=100,000"):
        fxpath.path_lifting(model)


def test_operations_outside_the_theory_are_refused_as_everywhere() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    with pytest.raises(fxpath.UnsupportedModelError, match="sigmoid"):
        fxpath.path_lifting(model)


def test_wrong_inputs() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="x has 2 entries, and the network 3 inputs"):
        fxpath.path_lifting(model, (3,), x=torch.ones(2))
    for read in ("activations", "realization"):
        with pytest.raises(ValueError, match="pass x="):
            getattr(fxpath.path_lifting(model), read)()
    with pytest.raises(KeyError, match=r"weight\[0, 3\] is no entry"):
        fxpath.path_lifting(model).through("weight", (0, 3))
    model.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="weight"):
        fxpath.path_lifting(model)
