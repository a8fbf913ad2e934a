"""Who holds which block of the KV cache."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NewType, Protocol

BlockId = NewType("BlockId", int)


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free; the planner counts before it asks, so this is a defect."""


class KeptContent(Protocol):
    """Knows which blocks are worth keeping while nobody holds them: the prefix cache."""

    def __contains__(self, block: BlockId) -> bool: ...

    def forget(self, block: BlockId) -> None:
        """The block is about to be given away and overwritten."""
        ...


class BlockPool:
    """The blocks of a KV cache: how many sequences hold each, and which may be taken. Only the planner changes it.

    Blocks are counted, never touched: their memory belongs to the runner. A block that nobody holds is free. Free ones
    whose content can still be found are taken last, the one unused for longest first (LRU).
    """

    def __init__(self, num_blocks: int, kept: KeptContent) -> None:
        self.num_blocks = num_blocks
        self._kept = kept
        self._num_holders = [0] * num_blocks
        # A stack with the lowest ids on top: blocks used last are taken first, while a CPU's cache may still hold them.
        self._blank = [BlockId(block) for block in reversed(range(num_blocks))]
        self._free_with_content: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds."""
        return len(self._blank) + len(self._free_with_content)

    def num_free_of(self, blocks: Iterable[BlockId]) -> int:
        """Return how many of these blocks nobody holds."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def allocate(self, num_blocks: int) -> tuple[BlockId, ...]:
        """Take blocks, each for one holder. Raises OutOfBlocksError, taking none, if fewer are free. O(num_blocks)."""
        if num_blocks > self.num_free:
            raise OutOfBlocksError(f"{num_blocks} blocks wanted, {self.num_free} of {self.num_blocks} free")
        blocks = tuple(self._take_free() for _ in range(num_blocks))
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Count one holder more of each of these blocks: they are held, or their content is to be found."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._free_with_content[block]
            self._num_holders[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Count one holder less of each of a sequence's blocks. Raises ValueError for one that nobody holds.

        The last ones become free first: a prefix is of use without what follows it, and not the other way round.
        """
        for block in reversed(blocks):
            if self._num_holders[block] == 0:
                raise ValueError(f"block {block} is released, but nobody holds it")
            self._num_holders[block] -= 1
            if self._num_holders[block] > 0:
                continue
            if block in self._kept:
                self._free_with_content[block] = None
            else:
                self._blank.append(block)

    def _take_free(self) -> BlockId:
        if self._blank:
            return self._blank.pop()
        block, _ = self._free_with_content.popitem(last=False)
        self._kept.forget(block)
        return block
