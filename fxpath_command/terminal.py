"""What a terminal is shown and a file is not: colour, and that something is going on."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

__all__ = ["complain", "counting", "note", "styled", "working"]

_STYLES = {"heading": "1", "error": "1;31", "finding": "33"}
_PATIENCE = 1.0  # seconds without a word
_CLEAR = "\r\x1b[K"


def styled(text: str, style: str, stream: TextIO) -> str:
    """Text in a colour, where a person reads the stream and has not asked for none (NO_COLOR).

    Example:
        >>> import io
        >>> styled("resnet18", "heading", io.StringIO())
        'resnet18'
    """
    plain = os.environ.get("NO_COLOR") or not _moves(stream)
    return text if plain else f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def _moves(stream: TextIO) -> bool:
    """Whether a stream is a terminal that knows more than letters."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def complain(text: str) -> None:
    """One line on standard error about what went wrong."""
    print(f"fxpath: {styled('error:', 'error', sys.stderr)} {text}", file=sys.stderr)


def note(text: str) -> None:
    """One line on standard error about what was done, in the place of what goes on."""
    print(f"{_CLEAR * _moves(sys.stderr)}fxpath: {text}", file=sys.stderr)


@contextlib.contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """Shows a person at a terminal what takes longer than a second, and takes it away again."""
    stream = sys.stderr
    if quiet or not _moves(stream):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_turn, args=(text, stream, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _turn(text: str, stream: TextIO, done: threading.Event) -> None:
    start = time.monotonic()
    if done.wait(_PATIENCE):
        return
    for sign in itertools.cycle("|/-\\"):
        seconds = time.monotonic() - start
        stream.write(f"{_CLEAR}{sign} {text}, {seconds:.0f} s")
        stream.flush()
        if done.wait(0.1):
            break
    stream.write(_CLEAR)
    stream.flush()


_WIDTH = 24  # letters of a bar


@contextlib.contextmanager
def counting(quiet: bool = False) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar for a person at a terminal, told of how many are done, of how many, and the last one.

    It takes itself away at the end; elsewhere there is nothing to tell.
    """
    stream = sys.stderr
    if quiet or not _moves(stream):
        yield None
        return
    start = time.monotonic()
    first: list[int] = []

    def tell(done: int, count: int, name: str) -> None:
        # What an earlier run did took no time of this one.
        first[:] = first or [done - 1]
        seconds = time.monotonic() - start
        left = seconds / max(1, done - first[0]) * (count - done)
        full = _WIDTH * done // max(1, count)
        bar = "#" * full + "." * (_WIDTH - full)
        room = max(8, shutil.get_terminal_size().columns - _WIDTH - 40)
        stream.write(f"{_CLEAR}[{bar}] {done} of {count}, {left:.0f} s left: {name[-room:]}")
        stream.flush()

    try:
        yield tell
    finally:
        stream.write(_CLEAR)
        stream.flush()
