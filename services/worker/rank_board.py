"""What the processes of a sharded worker tell each other while they start, through memory that all of them map."""

import struct
import time

MOST_BYTES = 1024
"""That a rank tells at once."""
START_PATIENCE_S = 600.0
"""How long a rank waits for another one: for the slowest's weights, and for its kernels to be compiled."""
_LOOK_S = 0.001
_HEADER = struct.Struct("<QI")  # how often the rank has told something, and the bytes of the last
_SLOT_BYTES = _HEADER.size + MOST_BYTES


class RankBoard:
    """One rank's view of it. Every rank tells equally often."""

    def __init__(self, memory: memoryview, rank: int, world_size: int, patience_s: float = START_PATIENCE_S) -> None:
        """`memory`: `num_bytes` of zeros at first."""
        self._memory = memory
        self._rank = rank
        self._world_size = world_size
        self._patience_s = patience_s
        self._number = 0

    @staticmethod
    def num_bytes(world_size: int) -> int:
        """Return what it takes: two slots a rank, used in turn, so that one is written while the other may be read."""
        return 2 * world_size * _SLOT_BYTES

    def exchange(self, told: bytes) -> list[bytes]:
        """Tell all ranks something, and return what each told, when all have. Raises TimeoutError."""
        assert len(told) <= MOST_BYTES
        self._number += 1
        at = self._slot(self._rank)
        self._memory[at + _HEADER.size : at + _HEADER.size + len(told)] = told
        # Behind what it is about: x86 and the interpreter keep this order.
        _HEADER.pack_into(self._memory, at, self._number, len(told))
        until_s = time.monotonic() + self._patience_s
        return [self._told_by(rank, until_s) for rank in range(self._world_size)]

    def _slot(self, rank: int) -> int:
        return (self._number % 2 * self._world_size + rank) * _SLOT_BYTES

    def _told_by(self, rank: int, until_s: float) -> bytes:
        at = self._slot(rank)
        while True:
            number, num_bytes = _HEADER.unpack_from(self._memory, at)
            if number == self._number:
                return bytes(self._memory[at + _HEADER.size : at + _HEADER.size + num_bytes])
            if time.monotonic() > until_s:
                raise TimeoutError(f"rank {rank} said nothing for {self._patience_s:.0f} s")
            time.sleep(_LOOK_S)
