"""What the ranks of a worker give each other within a step, over memory that all of them map."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.cpu_kernels import structures
from services.worker.cpu_kernels.library import address, kernels
from services.worker.engine.runner import RanksLostError
from services.worker.runner.models.shard import Shard

PATIENCE_S = 1.5
"""The least that a rank waits for others: so long that one that only gets no processor beside other work is not taken
for lost, and a worker with one that is has ended within 2 s. One that computes alone is waited for in proportion to
what this one did."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Where ranks meet: as `ranks` in ranks.h. Zeros at start."""

    arrivals: Tensor
    """[world_size, 8] int64"""
    slots: Tensor
    """[world_size, 2, slot_floats] float32"""

    @staticmethod
    def num_bytes(world_size: int, slot_floats: int) -> int:
        """Return what `of` takes."""
        return world_size * (structures.LINE_BYTES + 2 * slot_floats * torch.float32.itemsize)

    @classmethod
    def of(cls, memory: Tensor, world_size: int, slot_floats: int) -> "RankMemory":
        """Lay it out in memory, [num_bytes] uint8, that begins at a line of the processor's cache."""
        end = world_size * structures.LINE_BYTES
        return cls(
            memory[:end].view(torch.int64).view(world_size, -1),
            memory[end : cls.num_bytes(world_size, slot_floats)].view(torch.float32).view(world_size, 2, slot_floats),
        )


class Ranks:
    """One rank's seat among the ranks: every rank gives and takes the same things in the same order."""

    def __init__(
        self, shard: Shard, memory: RankMemory, patience_s: float = PATIENCE_S, sum_over_ranks: object = None
    ) -> None:
        """`sum_over_ranks`: a `structures.SumOverRanks` that does what the kernels would else do themselves."""
        self.shard = shard
        self._memory = memory
        self._sum = sum_over_ranks or structures.SumOverRanks()
        self.structure = structures.Ranks(
            rank=shard.rank,
            world_size=shard.world_size,
            slot_floats=memory.slots.shape[2],
            slots=address(memory.slots),
            arrivals=address(memory.arrivals, torch.int64),
            sum=self._sum,
            patience_s=patience_s,
        )
        """How the kernels are told of it. Points to what this object keeps."""

    @property
    def slot_floats(self) -> int:
        """The most that a rank gives at once."""
        return self._memory.slots.shape[2]

    def gather(self, given: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Give float32 values to all ranks, and return what each gave: of rank r, [sizes[r]].

        What is returned is overwritten at the next but one meeting. Raises RanksLostError.
        """
        own = given.flatten()
        assert len(own) == sizes[self.shard.rank] <= self.slot_floats
        half = (self.structure.num_meetings + 1) % 2
        self._memory.slots[self.shard.rank, half, : len(own)] = own
        kernels().shoal_meet(ctypes.byref(self.structure))
        self.check()
        return [self._memory.slots[rank, half, :size] for rank, size in enumerate(sizes)]

    def check(self) -> None:
        """Raise RanksLostError if a rank did not come to a meeting: nothing since then means anything."""
        if self.structure.is_broken:
            raise RanksLostError(f"rank {self.shard.rank} waited for another one in vain")
