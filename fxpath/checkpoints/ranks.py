"""One list shared out among processes, on torch.distributed alone.

Each rank has a run of the list without gaps, so that it reads one more file than it has rows.  Rows
go to rank 0 one by one as they are made; only rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


class Lost(RuntimeError):
    """Another process ended, or has not answered in time."""


class Ranks:
    """The processes of a group; one alone where there is none.

    Attributes:
        rank: of this process in the group.
        size: number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def told(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """This rank's part of a list that rank 0 makes."""
        if self.rank:
            part: list[T] = self._receive(0)
            return part
        found = make()
        parts = [list(found[start:stop]) for start, stop in shares(len(found), self.size)]
        for rank in range(1, self.size):
            self._send(parts[rank], rank)
        return parts[0]

    def gathered(self, own: Iterator[T]) -> Iterator[T]:
        """On rank 0 what all ranks make, as it is made; elsewhere nothing.

        Raises:
            Lost: naming the rank that did not go on.
        """
        if self.rank:
            for value in own:
                self._send([value], 0)
            self._send([], 0)
            return
        going = set(range(1, self.size))
        mine = True
        while mine or going:
            if mine:
                found = list(zip(range(1), own, strict=False))
                mine = bool(found)
                yield from (value for _, value in found)
            for rank in sorted(going):
                values: list[T] = self._receive(rank)
                if not values:
                    going.discard(rank)
                yield from values

    # -- messages ---------------------------------------------------------------------------------

    def _send(self, value: Any, rank: int) -> None:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)

        def send() -> None:
            for each in (torch.tensor([len(data)]), data):
                dist.send(each, group=self._group, group_dst=rank)

        self._wait(rank, send)

    def _receive(self, rank: int) -> Any:
        def receive() -> Tensor:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, group=self._group, group_src=rank)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, group=self._group, group_src=rank)
            return data

        return json.loads(bytes(self._wait(rank, receive).tolist()))

    def _wait(self, rank: int, run: Callable[[], T]) -> T:
        try:
            return run()
        except RuntimeError as error:
            raise Lost(
                f"rank {rank} ended, or has not answered in time, before all checkpoints were "
                "compared: what it said tells why; run the same command again to go on"
            ) from error


def shares(count: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each rank's part of a list.

    Example:
        >>> shares(5, 2), shares(1, 3)
        ([(0, 3), (3, 5)], [(0, 1), (1, 1), (1, 1)])
    """
    ends = [0]
    for rank in range(size):
        ends.append(ends[-1] + count // size + (rank < count % size))
    return list(zip(ends[:-1], ends[1:], strict=True))
