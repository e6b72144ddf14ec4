"""Every test starts from the same seeds and uses a bounded number of threads."""

import gc
import importlib.util
import os
import random
from collections.abc import Iterator

import hypothesis  # noqa: F401  (looks for those who refer to its generators: before any freeze)
import pytest
import torch

# Under pytest-xdist the workers share the cores; alone, more than four threads only add noise.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, torch.get_num_threads()))


# What adapts another library has examples that need it.
collect_ignore = [
    f"fxpath/plugins/{name}.py"
    for name in ("lightning", "torch_pruning", "transformers")
    if importlib.util.find_spec(name) is None
]


@pytest.fixture(scope="module", autouse=True)
def _old_objects_apart() -> None:
    """Let garbage collection pass over what is there before the tests of a module, and stays.

    These are half a million objects of torch, and what it caches by and by: to visit them takes a
    second, at each of the thousands of collections of a run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    yield
