"""Who holds which block of the KV cache."""

from collections.abc import Iterable
from typing import NewType

BlockId = NewType("BlockId", int)


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free; the planner counts before it asks, so this is a defect."""


class BlockPool:
    """The free blocks of a KV cache. Only the planner changes it.

    Blocks are counted, never touched: their memory belongs to the runner. A block is free or has exactly one holder.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # A stack with the lowest ids on top: blocks used last are taken first, while a CPU's cache may still hold them.
        self._free = [BlockId(block) for block in reversed(range(num_blocks))]
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        """Number of blocks that nothing holds."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> tuple[BlockId, ...]:
        """Take blocks out of the pool. Raises OutOfBlocksError, taking none, if fewer are free. O(num_blocks)."""
        if num_blocks > len(self._free):
            raise OutOfBlocksError(f"{num_blocks} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = tuple(self._free.pop() for _ in range(num_blocks))
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[BlockId]) -> None:
        """Give blocks back. Raises ValueError for one that is free already: it would get two holders."""
        for block in blocks:
            if self._is_free[block]:
                raise ValueError(f"block {block} is freed twice")
            self._is_free[block] = 1
            self._free.append(block)
