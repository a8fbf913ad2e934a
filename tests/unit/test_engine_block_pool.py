"""A block is free or has exactly one holder."""

import pytest

from services.worker.engine.block_pool import BlockPool, OutOfBlocksError


def test_no_block_is_given_twice() -> None:
    pool = BlockPool(8)
    blocks = [*pool.allocate(3), *pool.allocate(5)]
    assert sorted(blocks) == list(range(8))
    assert pool.num_free == 0


def test_freed_blocks_are_given_again() -> None:
    pool = BlockPool(2)
    pool.free(pool.allocate(2))
    assert sorted(pool.allocate(2)) == [0, 1]


def test_asking_for_too_many_takes_none() -> None:
    pool = BlockPool(2)
    with pytest.raises(OutOfBlocksError, match="3 blocks wanted, 2 of 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_block_freed_twice_is_refused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)
