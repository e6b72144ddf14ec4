"""Results that evaluate on demand, and that are plain numbers where they are stored."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

T = TypeVar("T", bound="Snapshot")


class Snapshot:
    """A result that never changes once it is made, and that reads two networks when asked for more.

    Pickled it leaves the networks behind, and takes along what it can say about them.
    """

    _networks: ClassVar[tuple[str, ...]]
    _numbers: ClassVar[tuple[str, ...]]

    def __getstate__(self) -> dict[str, Any]:
        for name in self._numbers:
            getattr(self, name)
        return {key: value for key, value in vars(self).items() if key not in self._networks}

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied
