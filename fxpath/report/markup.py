"""HTML from text, escaped unless it is markup already."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML, and is not escaped again."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | int | bool | None) -> Markup:
    """An element; children are text, except where they are markup.

    Args:
        tag: its name.
        *children: contents, in order.
        **attributes: by name, with ``_`` for ``-`` and one ``_`` after a name that Python keeps
            for itself.  ``True`` is an attribute without a value, ``None`` and ``False`` none.

    Example:
        >>> element("a", "1 < 2", element("b", "!"), href="#top", class_="x", hidden=True)
        '<a href="#top" class="x" hidden>1 &lt; 2<b>!</b></a>'
    """
    opening = tag
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        opening += " " + name.removesuffix("_").replace("_", "-")
        opening += "" if value is True else f'="{escape(str(value))}"'
    return Markup(f"<{opening}>{join(*children)}" + ("" if tag in _VOID else f"</{tag}>"))


def join(*parts: str) -> Markup:
    """Parts one after the other, those that are text escaped."""
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in parts))


_VOID = {"meta", "link", "input", "wbr"}
