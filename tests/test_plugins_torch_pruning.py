"""Path mass as an importance in Torch-Pruning's own pruners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from tests.support.nets import randomize

tp = pytest.importorskip("torch_pruning")
from fxpath.plugins.torch_pruning import PathMagnitudeImportance  # noqa: E402

SHAPE = (3, 6, 6)


class Chain(nn.Sequential):
    """Nothing ties a channel to another one."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )


class Residual(nn.Module):
    """Channels tied by a sum, read by a depthwise convolution and joined to others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.norm1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.outer, self.norm2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.side = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.outer(self.norm1(self.inner(x)).relu()))).relu()
        x = torch.cat([self.depthwise(x), self.side(x)], 1).relu()
        return self.head(x.mean((2, 3)))


def chain() -> nn.Module:
    torch.manual_seed(1)
    return randomize(Chain(), weights=True).train()


def residual() -> nn.Module:
    torch.manual_seed(2)
    return randomize(Residual(), weights=True).train()


def pruner_of(model: nn.Module, importance: Any, **options: Any) -> Any:
    head = model[8] if isinstance(model, Chain) else model.head
    settings = {"global_pruning": True, "pruning_ratio": 0.4, "ignored_layers": [head]}
    return tp.pruner.BasePruner(
        model, torch.zeros(1, *SHAPE), importance=importance, **{**settings, **options}
    )


def groups_of(pruner: Any) -> list[Any]:
    return list(pruner.DG.get_all_groups(pruner.ignored_layers))


def without(model: nn.Module, group: Any, position: int) -> nn.Module:
    """A copy in which all is zero that leads into the channels at a position of a group."""
    smaller = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        for dep, idxs in group.items:
            module = smaller.get_submodule(names.get(dep.target.module, ""))
            if "out_channels" not in dep.handler.__name__ or module is smaller:
                continue
            # Of a flattened channel several indices go.
            each = len(idxs) // len(group[0].idxs)
            own = idxs[each * position : each * (position + 1)]
            for parameter in module.parameters():
                parameter[own] = 0
    return smaller


@pytest.fixture(scope="module")
def chained() -> tuple[nn.Module, PathMagnitudeImportance]:
    model = chain()
    return model, PathMagnitudeImportance(model, SHAPE)


def test_importance_is_what_is_lost_with_an_untied_channel(
    chained: tuple[nn.Module, PathMagnitudeImportance],
) -> None:
    model, importance = chained
    program = fxpath.compile(copy.deepcopy(model), SHAPE, backend="eager", dtype=torch.float64)
    own, norm = program.captured.source, program.path_norm()
    groups = groups_of(pruner_of(model, importance))
    assert [len(group[0].idxs) for group in groups] == [8, 5, 6]
    for group in groups:
        found = importance(group)
        assert found.dtype == torch.float64 and found.shape == (len(group[0].idxs),)
        for position, share in enumerate(found.tolist()):
            own.load_state_dict(without(model, group, position).state_dict())
            assert share == pytest.approx(1 - program.path_norm() / norm, rel=1e-4)
    # Path mass of all channels of a layer is what does not start behind it.
    analysis = fxpath.analyze(model, SHAPE)
    sums = [importance(group).sum().item() for group in groups]
    shares = [analysis.neuron_shares[name].sum().item() for name in ("6", "3", "0")]
    assert sums == pytest.approx(shares, rel=1e-5)


def test_importance_bounds_what_is_lost_with_tied_channels() -> None:
    model = residual()
    importance = PathMagnitudeImportance(model, SHAPE)
    norm = fxpath.path_norm(model, SHAPE, dtype=torch.float64)
    over = {}
    for group in groups_of(pruner_of(model, importance)):
        found = importance(group).tolist()
        left = fxpath.path_norm(without(model, group, 0), SHAPE, dtype=torch.float64)
        over[len(found), len(group.items)] = found[0] / (1 - left / norm)
    assert len(over) == 3
    tied = max(over, key=lambda sizes: sizes[1])
    assert 1.01 < over.pop(tied) < 3
    assert list(over.values()) == pytest.approx([1, 1], rel=1e-4)


def test_groups_are_ranked_as_prune_channels_does() -> None:
    model = chain()
    slim = fxpath.prune_channels(model, 8, SHAPE).model
    pruner = pruner_of(model, PathMagnitudeImportance(model, SHAPE), pruning_ratio=8 / 19)
    pruner.step()
    state, expected = model.state_dict(), slim.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "kind, everywhere",
    [("BasePruner", False), ("MagnitudePruner", True), ("GroupNormPruner", True)],
)
def test_pruners_run_with_it(kind: str, everywhere: bool) -> None:
    model = residual()
    pruner = getattr(tp.pruner, kind)(
        model,
        torch.zeros(1, *SHAPE),
        importance=PathMagnitudeImportance(model, SHAPE),
        global_pruning=everywhere,
        pruning_ratio=0.4,
        ignored_layers=[model.head],
    )
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner.step()
    assert model(torch.randn(2, *SHAPE)).shape == (2, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.8 * before
    assert fxpath.path_norm(model, SHAPE) > 0


def test_importance_is_of_the_model_as_it_is() -> None:
    model = residual()
    importance = PathMagnitudeImportance(model, SHAPE)
    pruner = pruner_of(model, importance, iterative_steps=2)

    def assert_fresh() -> list[Tensor]:
        fresh = PathMagnitudeImportance(model, SHAPE)
        found = [importance(group) for group in groups_of(pruner)]
        for share, group in zip(found, groups_of(pruner), strict=True):
            assert torch.equal(share, fresh(group))
        return found

    first = assert_fresh()
    with torch.no_grad():
        model.inner.weight.data[0] *= 2
    second = assert_fresh()
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    sizes = [len(each) for each in second]
    for _ in range(2):
        pruner.step()
        found = [len(each) for each in assert_fresh()]
        assert sum(found) < sum(sizes)
        sizes = found


def test_a_rescaled_model_loses_the_same_channels() -> None:
    model = residual()
    rescaled = fxpath.rescale(model, SHAPE, seed=3)

    def left(of: nn.Module, make: Callable[[nn.Module], Any]) -> dict[str, Any]:
        pruned = copy.deepcopy(of)
        pruner = pruner_of(pruned, make(pruned))
        pruner.step()
        history = pruner.pruning_history()
        return {name: sorted(indices) for name, _, indices in history}

    by_path = [left(m, lambda m: PathMagnitudeImportance(m, SHAPE)) for m in (model, rescaled)]
    assert by_path[0] and by_path[0] == by_path[1]
    by_size = [
        left(m, lambda _: tp.importance.GroupMagnitudeImportance()) for m in (model, rescaled)
    ]
    assert by_size[0] != by_size[1]


def test_what_cannot_be_ranked_is_refused() -> None:
    model = chain()
    importance = PathMagnitudeImportance(model, SHAPE)
    pruner = pruner_of(model, importance, ignored_layers=[])
    with pytest.raises(ValueError, match="8 makes channels that are inputs or outputs.*ignored"):
        pruner.step()
    with pytest.raises(fxpath.UnsupportedModelError, match="sigmoid"):
        PathMagnitudeImportance(nn.Sequential(model, nn.Sigmoid()), SHAPE)
    nn.utils.prune.l1_unstructured(model[0], "weight", 2)
    with pytest.raises(ValueError, match="0.weight: computed from other parameters"):
        PathMagnitudeImportance(model, SHAPE)


class Sliced(nn.Module):
    """The last channels of the first layer are read by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()[:, :4])


def test_channels_that_no_path_crosses() -> None:
    model = Sliced()
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(2, 4))
    group = graph.get_pruning_group(model.first, tp.prune_linear_out_channels, [5, 1])
    found = PathMagnitudeImportance(model, (4,))(group).tolist()
    share = fxpath.analyze(model, (4,)).neuron_shares["first"][1].item()
    assert share > 0 and found == pytest.approx([0, share])


def test_channels_behind_what_is_analysed() -> None:
    model = chain()
    (behind, *_) = groups_of(pruner_of(model, None))
    importance = PathMagnitudeImportance(model, SHAPE, until="4")
    with pytest.raises(ValueError, match="6: no layer that is analysed .* ignored_layers"):
        importance(behind)
