"""What goes wrong with files and names, in one line."""

from __future__ import annotations

from collections.abc import Iterable


class UsageError(Exception):
    """What the user can put right, said in one line."""


def one_line(text: object) -> str:
    r"""The first line that says something; the type's name for an exception that has none.

    Example:
        >>> one_line(RuntimeError("two\nlines")), one_line(KeyboardInterrupt())
        ('two', 'KeyboardInterrupt')
    """
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(text).__name__


def by(shape: Iterable[int]) -> str:
    """A shape as people write it.

    Example:
        >>> by((3, 4)), by(())
        ('3x4', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def plain(name: object) -> str:
    r"""A name out of a file, which may hold anything, on one line.

    Example:
        >>> print(plain("0.weight"), plain("a\nb"))
        0.weight 'a\nb'
    """
    text = str(name)
    return text if text.isprintable() else repr(text)


def some(names: Iterable[object], most: int = 4) -> str:
    """The first few of several names.

    Example:
        >>> some("abcdef")
        'a, b, c, d, ...'
    """
    listed = [plain(name) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
