"""`python -m fxpath`: the command line."""

import sys

from fxpath_command import main

if __name__ == "__main__":
    sys.exit(main())
