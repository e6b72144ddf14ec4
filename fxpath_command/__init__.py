# PYTHON_ARGCOMPLETE_OK
"""What the command `fxpath` starts: its words, read without torch, whose import takes seconds.

Help and mistakes in the arguments are answered by the standard library alone; the package is
imported where a command runs.  A Ctrl-C ends with one line and exit code 130, also in the middle of
that import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fxpath_command.parser import parse
from fxpath_command.terminal import working

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0; 1 if a bound or a certificate does not hold; 2 if something was wrong with
        the arguments or with a model; 130 after a Ctrl-C.

    Raises:
        SystemExit: After `--help`, `--version` and arguments that do not parse, as argparse does.

    Example:
        >>> main(["check", "no_such_model"])
        2
    """
    try:
        arguments = parse(argv)
        with working("loading torch", arguments.quiet):
            from fxpath.cli import run
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("fxpath: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # A reader that has seen enough, as in `fxpath graph resnet18 | head`, is no error; the
        # interpreter must not find a closed stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
