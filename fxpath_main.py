"""What the command `fxpath` starts: outside of the package, whose import takes seconds.

A Ctrl-C in those seconds ends like any other: one line, exit code 130.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Imports the package and runs its command line."""
    try:
        from fxpath.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("fxpath: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
