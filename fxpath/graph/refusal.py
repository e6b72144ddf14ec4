"""An operation, or a value that it reads, has no exact rule."""

from __future__ import annotations

INFINITE = (
    "it reads a constant with infinite or NaN entries",
    "use finite constants (a mask of -inf belongs to a softmax, which no path-norm covers)",
)
RANDOM = ("its result is random", "remove the noise in eval mode")
READ_OUT = (
    "it reads a number out of a tensor, by which the program goes on",
    "keep it a tensor, or a constant of the module",
)
SPARSE = (
    "its weights are stored sparsely, and scores have an entry for each weight",
    "store them as a dense tensor (weight.to_dense())",
)
UNKNOWN_SHAPE = (
    "the number of entries that it returns depends on values, so torch.export does not know it",
    "select by a list of positions (mask.nonzero()) that is kept in a buffer",
)


class UnfollowedGate(Exception):
    """The value of a gate is asked for inside which something has no rule."""


class Refusal(Exception):
    """Says why there is no exact rule, and what can be done."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Keep both halves of the message."""
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
