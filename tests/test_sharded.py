"""Sharded parameters: two processes against the same model in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

import fxpath
from tests.support.sharded import CASES, main, one_thread

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


def spawned(folder: Path, world: int, names: tuple[str, ...], more: bool) -> list[dict[str, Any]]:
    """What each of some processes found."""
    with one_thread():
        multiprocessing.spawn(main, (world, str(folder), names, more), world)
    files = [folder / f"rank{world}_{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(tmp_path_factory.mktemp("ranks"), 2, tuple(CASES), True)


def unwrapped(named: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("module."): value for name, value in named.items()}


def check(name: str, ranks: list[dict[str, Any]]) -> None:
    """One case on all ranks against the model as it was."""
    make, shape, _, cut = CASES[name]
    model = make()
    analysis = fxpath.analyze(model, shape)
    for rank in ranks:
        found = rank[name]
        assert found["norm"] == analysis.path_norm
        scores = unwrapped(found["scores"])
        assert scores.keys() == analysis.scores.keys()
        for each, score in analysis.scores.items():
            assert scores[each].dtype == score.dtype
            assert torch.equal(scores[each], score), each
        neurons = unwrapped(found["neurons"])
        assert all(torch.equal(neurons[n], x) for n, x in analysis.neuron_shares.items())
        assert all(found["spread"].values())
        if name != "data parallel":
            assert all(found["sharded"].values())
            assert found["table"] == analysis.table(depth=1).to_csv()
        if "absolute" in found:
            largest, absolute = found["absolute"]
            expected = analysis.path_magnitude(largest.removeprefix("module."))
            assert torch.equal(absolute, expected)
    said, data, report = ranks[0][name]["said"]
    if name != "data parallel":
        assert (said, data, report) == (str(analysis), analysis.to_dict(), analysis.report())
    if cut:
        check_pruned(name, ranks)


def check_pruned(name: str, ranks: list[dict[str, Any]]) -> None:
    make, shape, _, cut = CASES[name]
    pruned = fxpath.prune(make(), input_shape=shape, **cut)
    for rank in ranks:
        found = rank[name]
        masks, state = unwrapped(found["masks"]), unwrapped(found["state"])
        assert masks.keys() == pruned.masks.keys()
        assert all(torch.equal(masks[n], mask) for n, mask in pruned.masks.items())
        assert any(not bool(mask.all()) for mask in masks.values())
        assert all(torch.equal(state[n], value) for n, value in pruned.state_dict.items())
        assert found["lost"] == (pruned.certificate.value, pruned.path_magnitude_share)
        assert all(
            torch.equal(x, pruned.state_dict[n]) for n, x in unwrapped(found["zeroed"]).items()
        )
        assert found["fits"]
    if name != "data parallel":
        assert ranks[0][name]["pruned"] == str(pruned)


@pytest.mark.parametrize("name", CASES)
def test_sharded_is_as_unsharded(name: str, ranks: list[dict[str, Any]]) -> None:
    check(name, ranks)


def test_training_goes_on_as_without_an_analysis(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["training"]
        without, asked = found["states"]
        assert all(torch.equal(without[name], value) for name, value in asked.items())
        assert found["same"]


def test_parameters_that_are_gathered_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "reshard" in rank["training"]["gathered"]
        first, second = rank["training"]["norms"]
        assert first == second > 0


def test_no_rank_holds_more_than_a_few_layers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        # Half of the scores of 8 layers, and what one layer takes.
        assert rank["memory"]["sharded"] < 4 + 4
        # The same measure notices all scores, and more.
        assert rank["memory"]["whole"] > 8


#: What its refusal says of each; of all others that tensors are sharded, and what to do.
SAID = {
    "FSDP1": ["FullyShardedDataParallel", "fully_shard", "summon_full_params"],
    "Partial": ["Partial", "0.weight", "redistribute"],
    "buffer": ["norm.running_var", "Replicate"],
    "drifted": ["norm.running_mean: not the same", "broadcast"],
    "drifted, pruned": ["norm.running_mean: not the same", "broadcast"],
    "samples": ["2 samples", "input_shape"],
}


def test_all_else_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, said in rank["refused"].items():
            for part in SAID.get(name, ["sharded", "get_model_state_dict"]):
                assert part in said, (name, said)


@pytest.mark.long
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks(world: int, tmp_path: Path) -> None:
    names = tuple(name for name in CASES if name != "both" or world == 4)
    ranks = spawned(tmp_path, world, names, False)
    for name in names:
        check(name, ranks)
