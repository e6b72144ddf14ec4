"""`python -m fxpath_command`: the command line, as fast to answer as the command `fxpath`."""

import sys

from fxpath_command import main

sys.exit(main())
