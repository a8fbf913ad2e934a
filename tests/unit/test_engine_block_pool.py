"""A block is free or held, by as many as it was given to; free blocks with content are taken last."""

import pytest

from services.worker.engine.block_pool import BlockId, BlockPool, OutOfBlocksError


class Kept(set[BlockId]):
    """Blocks whose content is worth keeping."""

    def forget(self, block: BlockId) -> None:
        self.discard(block)


def test_no_block_is_given_twice() -> None:
    pool = BlockPool(8, Kept())
    blocks = [*pool.allocate(3), *pool.allocate(5)]
    assert sorted(blocks) == list(range(8))
    assert pool.num_free == 0


def test_released_blocks_are_given_again() -> None:
    pool = BlockPool(2, Kept())
    pool.release(pool.allocate(2))
    assert sorted(pool.allocate(2)) == [0, 1]


def test_asking_for_too_many_takes_none() -> None:
    pool = BlockPool(2, Kept())
    with pytest.raises(OutOfBlocksError, match="3 blocks wanted, 2 of 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_shared_block_is_free_when_its_last_holder_has_left() -> None:
    pool = BlockPool(1, Kept())
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(blocks)


def test_content_is_kept_while_there_are_blank_blocks_and_the_oldest_goes_first() -> None:
    kept = Kept()
    pool = BlockPool(4, kept)
    old, new = pool.allocate(1), pool.allocate(1)
    kept.update(old, new)
    pool.release(old)
    pool.release(new)
    pool.allocate(2)
    assert kept == {*old, *new}
    assert pool.allocate(1) == old
    assert kept == {*new}


def test_of_a_sequences_blocks_the_last_is_reused_first() -> None:
    kept = Kept()
    pool = BlockPool(3, kept)
    blocks = pool.allocate(3)
    kept.update(blocks)
    pool.release(blocks)
    assert pool.allocate(2) == (blocks[2], blocks[1])


def test_a_free_block_that_is_found_again_is_held_and_keeps_its_content() -> None:
    kept = Kept()
    pool = BlockPool(2, kept)
    blocks = pool.allocate(1)
    kept.update(blocks)
    pool.release(blocks)
    assert pool.num_free_of(blocks) == 1
    pool.share(blocks)
    assert pool.num_free_of(blocks) == 0
    assert pool.allocate(1) != blocks
    assert kept == {*blocks}
