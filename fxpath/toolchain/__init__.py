"""Where other compilers, runtimes and tools meet fxpath.

``backend`` is the backend of ``torch.compile`` (``dynamo`` and ``separate`` read what it is given,
``part`` is what it finds); ``stages`` has the passes as functions from one exported program to the
next, in the ``dialect`` of each stage; ``annotations`` writes shares of path mass into the nodes of
a program.
"""

from fxpath.toolchain.annotations import Annotation, annotate
from fxpath.toolchain.stages import (
    derive_program,
    fold_program,
    lift_program,
    lower_program,
    reduce_program,
)

__all__ = [
    "Annotation",
    "annotate",
    "derive_program",
    "fold_program",
    "lift_program",
    "lower_program",
    "reduce_program",
]
