"""State dicts in the forms in which people save them, and their way into a model."""

import argparse
import collections
import copy
import datetime
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxpath.capture.loading import UsageError, load_model

State = dict[str, torch.Tensor]


def trained(nets: Any, seed: int = 1) -> nn.Module:
    """A net whose every entry differs from a new one's, its statistics too."""
    net = nets.make()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=torch.manual_seed(seed)) + 0.1)
    return net  # type: ignore[no-any-return]


def read(content: object, model: str = "a_model:make", file: str = "c.pth") -> State:
    """The state of a model after `--checkpoint`."""
    torch.save(content, file)
    loaded = load_model(model, checkpoint=Path(file))
    assert isinstance(loaded, nn.Module)
    return loaded.state_dict()


def same(found: State, expected: State) -> bool:
    return all(
        torch.equal(value, expected[name])
        for name, value in found.items()
        if "num_batches" not in name
    )


def refused(content: object, model: str = "a_model:make") -> str:
    with pytest.raises(UsageError) as caught:
        read(content, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


# What loads

FORMS: dict[str, Callable[[State], object]] = {
    "plain": lambda s: s,
    "ordered": collections.OrderedDict,
    "parameters": lambda s: {
        k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()
    },
    "no counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "entries beside": lambda s: {**s, "epoch": 3, "best": None},
    "nested twice": lambda s: {"checkpoint": {"state": {"weights": s}}},
    "optimizer beside": lambda s: {
        "net": s,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4), "step": torch.tensor(1.0)}}},
        "scheduler": {"last_epoch": 1},
    },
    "generator and discriminator": lambda s: {
        "generator": s,
        "discriminator": {"0.weight": torch.zeros(9)},
    },
    "averages beside": lambda s: {"ema_state_dict": zeros(s), "model": s},
    "averages before": lambda s: {"model_ema": zeros(s), "state_dict": s},
    "only averages": lambda s: {"model_ema": s},
    "averages in one dict": lambda s: {**prefixed("model.", s), **prefixed("model_ema.", zeros(s))},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)},
    "the same twice": lambda s: {"state_dict": s, "best_state_dict": copy.deepcopy(s)},
    "Lightning": lambda s: {
        "state_dict": prefixed("model.", s),
        "hyper_parameters": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")),
        "epoch": 3,
    },
    "compiled submodules": lambda s: {k.replace(".", "._orig_mod.", 1): v for k, v in s.items()},
    "compiled, then parallel": lambda s: prefixed("module._orig_mod.", s),
    "parallel, then compiled": lambda s: prefixed("_orig_mod.module.", s),
    "FSDP": lambda s: prefixed("_fsdp_wrapped_module.", s),
    **{
        prefix: lambda s, p=prefix: {"state_dict": prefixed(p, s)}  # type: ignore[misc]
        for prefix in ("module.", "model.", "net.", "backbone.", "model.module.", "a.b.c.")
    },
    "numbers of numpy": lambda s: {"model": s, "best": np.float64(0.9), "step": np.int64(3)},
    "arrays of numpy": lambda s: {"model": s, "curve": np.arange(3.0)},
    "dates and paths": lambda s: {
        "model": s,
        "when": datetime.datetime(2020, 1, 2),
        "where": pathlib.PurePosixPath("/tmp"),
        "counts": collections.Counter("aab"),
        "set": {1, 2},
    },
    "kinds of dicts and lists": lambda s: {
        "model": collections.defaultdict(list, s),
        "losses": collections.deque([1.0, 2.0], maxlen=9),
    },
}
