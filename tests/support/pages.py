"""Pages in Markdown whose examples run."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page in one namespace, in order."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    found = blocks(page, "python")
    assert found, f"{page.name} has no example"
    for number, block in enumerate(found):
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), namespace)
    return namespace
