"""Every test starts from the same seeds and uses a bounded number of threads."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

# Under pytest-xdist the workers share the cores; alone, more than four threads only add noise.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    yield
