"""The memory that all processes of a sharded worker map, and what lies where in it."""

import mmap
import os

from services.worker.plan_ring import ring_bytes
from services.worker.rank_beats import LINE_BYTES
from services.worker.rank_board import START_PATIENCE_S, RankBoard


class RankFile:
    """One rank's mapping."""

    def __init__(self, fd: int, rank: int, world_size: int, patience_s: float = START_PATIENCE_S) -> None:
        """`fd`: of memory, of any size; every rank gives it the same ones."""
        self.rank = rank
        self.world_size = world_size
        self._fd = fd
        self._num_bytes = 0
        self.plans = self.more(ring_bytes(world_size))
        """For a `PlanWriter` or a `PlanReader`."""
        self.beats = self.more(world_size * LINE_BYTES)
        """For `RankBeats`."""
        self.board = RankBoard(self.more(RankBoard.num_bytes(world_size)), rank, world_size, patience_s)

    def more(self, num_bytes: int) -> memoryview:
        """Map more of it, zeros at first; every rank does so in the same order."""
        begin = self._num_bytes
        self._num_bytes += -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # Another rank may have made it longer: this never makes it shorter.
        os.posix_fallocate(self._fd, 0, self._num_bytes)
        return memoryview(mmap.mmap(self._fd, self._num_bytes - begin, offset=begin))[:num_bytes]
