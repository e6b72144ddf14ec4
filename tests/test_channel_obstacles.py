"""Channels that stay, and the reason that is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from tests.support.channels import check, made

# -- what stays, and why ---------------------------------------------------------------------------


class Literal(nn.Module):
    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.conv, self.literal = nn.Conv2d(3, 4, 3), literal
        self.a, self.b = nn.Linear(36, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x.view(-1, 36) if self.literal else x.view(x.size(0), -1)  # baked
        return self.b(F.relu(self.a(x)))


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.a(x)).chunk(2, 1)  # baked
        return self.c(F.relu(self.b(left + right)))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1)
        self.c, self.d = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))  # baked
        return self.d(F.relu(self.c(x)))


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)  # baked
        return self.c(F.relu(self.b(x)))


class Reader(nn.Module):
    """Its filters are as many as it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + torch.arange(4.0, dtype=x.dtype).reshape(4, 1, 1)  # baked
        return self.c(F.relu(self.b(x)))


def regrouped(x: Tensor) -> Tensor:
    return x.view(len(x), 4, 2)


class Helped(nn.Module):
    """Its sizes are written into a function that `forward` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = regrouped(self.a(x)).amax(-1)  # baked
        return self.c(F.relu(self.b(x)))


class Obstacles(nn.Module):
    """Side by side, so that one run of the verb meets them all."""

    def __init__(self) -> None:
        super().__init__()
        self.literal, self.chunked, self.padded = Literal(True), Chunked(), Padded()
        self.shuffled, self.reader, self.helped = Shuffled(), Reader(), Helped()

    def forward(self, x: Tensor) -> Tensor:
        convs = self.chunked, self.padded, self.shuffled, self.reader
        ends = [self.literal(x), self.helped(x.mean((2, 3)))]
        return torch.cat([*ends, *(part(x).flatten(1) for part in convs)], 1)


def test_what_the_code_holds_on_to_stays() -> None:
    model, shape = made(Obstacles()), (3, 5, 5)
    result = fxpath.prune_channels(model, 0.5, shape)
    reasons = {row["name"]: row for row in result.kept if row["source_line"]}
    stays = {
        "literal.conv",
        "padded.b",
        *(f"{name}.a" for name in ("chunked", "padded", "shuffled")),
    }
    assert reasons.keys() == stays | {"reader.a", "helped.a"}
    assert all("# baked" in row["source_line"] for row in reasons.values())
    rows = {row["name"]: row for row in result.layers}
    assert all(rows[name]["before"] == rows[name]["after"] for name in reasons)
    free = {"literal.a", "chunked.b", "padded.c", "shuffled.b", "reader.b", "helped.b"}
    assert free <= rows.keys() and any(rows[n]["after"] < rows[n]["before"] for n in free)
    assert "# baked" in str(result)
    check(model, shape, result)


def test_sizes_that_follow_the_tensor_are_no_obstacle() -> None:
    model = made(Literal(False))
    result = fxpath.prune_channels(model, 1.0, (3, 5, 5), min_channels=2)
    assert [row["after"] for row in result.layers] == [2, 2, 2]
    assert result.model.get_submodule("a").in_features == 18
    check(model, (3, 5, 5), result)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x) / x.shape[1]  # counted


def test_a_number_that_depends_on_the_channels_is_an_error_with_the_line() -> None:
    with pytest.raises(ValueError, match=r"# counted.*exclude"):
        fxpath.prune_channels(made(Counted()), 0.5, (3, 4, 4))


class Loaded(nn.Module):
    def __init__(self, constant: float) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)) + self.constant  # loaded
        return self.c(F.hardtanh(self.b(x), 0.5, 2.0))  # clamped


def test_channels_that_are_not_zero_without_weights_stay() -> None:
    result = fxpath.prune_channels(made(Loaded(1.5)), 1.0)
    assert result.channels == (0, 0)
    lines = [row["source_line"].split("# ")[-1] for row in result.kept if row["source_line"]]
    assert lines == ["loaded", "clamped"]
    result = fxpath.prune_channels(made(Loaded(0.0)), 1.0)
    assert [row["after"] for row in result.layers] == [1, 4, 2]


class Shared(nn.Module):
    """What meets all channels alike is none's own: gains of positions, and one filter for all."""

    gain: Tensor
    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 2, 1)
        self.register_buffer("gain", torch.rand(4) + 0.5)
        self.register_buffer("filter", torch.rand(1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) * self.gain)
        return self.b(F.conv1d(x, self.filter.expand(x.shape[1], 1, 2), groups=x.shape[1]))


def test_what_all_channels_share_keeps_none() -> None:
    model = made(Shared())
    result = fxpath.prune_channels(model, 1.0, (3, 4))
    assert [row["after"] for row in result.layers] == [1, 2]
    assert [row["name"] for row in result.kept] == ["b"]
    check(model, (3, 4), result)


def test_modules_whose_tensors_were_exchanged_say_what_they_have() -> None:
    model = made(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    for layer, name, axis in (
        (model[0], "weight", 0),
        (model[0], "bias", 0),
        (model[2], "weight", 1),
    ):
        tensor = layer.get_parameter(name)
        setattr(layer, name, nn.Parameter(tensor.detach().narrow(axis, 0, 6).clone()))
    result = fxpath.prune_channels(model, 0.5)
    assert (result.model[0].out_features, result.model[2].in_features) == (3, 3)


def test_channels_that_all_go_together_stay() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)).mean(1, keepdim=True))))

    model = made(Mean())
    result = fxpath.prune_channels(model, 3, (3, 4, 4))
    assert [row["after"] for row in result.layers] == [4, 3, 2]
    check(model, (3, 4, 4), result)


def test_computed_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"^0\.weight: computed .*prune\.remove"):
        fxpath.prune_channels(model, 0.5)
    prune.remove(model[0], "weight")
    parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"^2\.weight: computed .*remove_parametrizations"):
        fxpath.prune_channels(model, 0.5)
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(TypeError, match="ExportedProgram"):
        fxpath.prune_channels(program, 0.5)  # type: ignore[arg-type]


def test_auxiliary_heads_are_named() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(x) + self.aux(x) if self.training else self.b(x)

    with pytest.warns(UserWarning, match="^aux: not reached in eval mode"):
        fxpath.prune_channels(Auxiliary(), 0.5)
