"""What the processes of a sharded worker inherit from whoever starts them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RankLink:
    """What connects a rank to the others."""

    rank: int
    memory_fd: int
    bells: tuple[socket.socket, ...]
    """To ranks 1, 2 and so on; of another rank than 0, the one to it."""

    @property
    def told(self) -> dict[str, Any]:
        """What its process is told of it: fields of EngineConfig."""
        bell_fds = ",".join(str(bell.fileno()) for bell in self.bells)
        return {"rank": self.rank, "memory_fd": self.memory_fd, "bell_fds": bell_fds}

    @property
    def fds(self) -> tuple[int, ...]:
        """What its process inherits."""
        memory = (self.memory_fd,) if self.memory_fd else ()
        return (*memory, *(bell.fileno() for bell in self.bells))


@contextmanager
def rank_links(shards: int) -> Iterator[list[RankLink]]:
    """Make what ranks share; they inherit it, and this process keeps nothing.

    The memory has no name: nothing is left of it when its processes are gone, and /dev/shm, of which containers have
    little, is not used.
    """
    if shards == 1:
        yield [RankLink(0, 0, ())]
        return
    memory_fd = os.memfd_create("shoal-ranks")
    pairs = [socket.socketpair() for _ in range(1, shards)]
    try:
        leads = RankLink(0, memory_fd, tuple(first for first, _ in pairs))
        yield [leads, *(RankLink(rank, memory_fd, (second,)) for rank, (_, second) in enumerate(pairs, 1))]
    finally:
        os.close(memory_fd)
        for pair in pairs:
            for end in pair:
                end.close()
