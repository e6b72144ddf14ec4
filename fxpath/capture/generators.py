"""Random numbers of Python and numpy: a trace holds them as constants."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any


def _numpy() -> Any:
    """The generator of numpy, if the caller has loaded numpy."""
    return sys.modules.get("numpy.random")


def states() -> tuple[Any, ...]:
    """The state of both generators, as something that can be compared."""
    numpy = _numpy()
    if numpy is None:
        return (random.getstate(),)
    name, keys, *rest = numpy.get_state()
    return random.getstate(), name, keys.tolist(), *rest


def reseed() -> None:
    """Go on with other numbers."""
    random.seed(repr(random.random()))
    numpy = _numpy()
    if numpy is not None:
        numpy.seed(numpy.randint(2**31))


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Leave both generators as they were."""
    before, numpy = random.getstate(), _numpy()
    kept = None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        random.setstate(before)
        if numpy is not None:
            numpy.set_state(kept)
