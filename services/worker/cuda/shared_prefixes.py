"""Which decodes of a step begin with the same blocks, so that these are read once for all of them.

Sequences share blocks when the prefix cache gave them the same ones, or when they are choices of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from services.worker.engine.block_pool import BlockId

LEAST_SHARED_TOKENS = 256
"""Of a prefix: below, its part of the result costs more to put aside and to fetch than its keys to read again."""
LEAST_TOKENS_SAVED = 8192
"""Of a step: below, another launch a layer takes longer than what it saves, 1 us for 1,000 tokens of an 8B model."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Sequences that begin with the same blocks."""

    members: tuple[int, ...]
    """Their numbers in the step; two at least"""
    num_blocks: int

    @property
    def blocks_saved(self) -> int:
        """Blocks that are not read a second time."""
        return (len(self.members) - 1) * self.num_blocks


def shared_prefixes(
    block_tables: Sequence[tuple[BlockId, ...]], first_positions: Sequence[int], block_size_tokens: int
) -> list[SharedPrefix]:
    """Group sequences by what they share, those that save most first; nothing if too little would be saved.

    A sequence is in one group at most, and only blocks that its tokens before `first_positions` fill are shared: the
    one that a step writes never is.
    """
    by_first_block: dict[BlockId, list[int]] = {}
    for number, table in enumerate(block_tables):
        by_first_block.setdefault(table[0], []).append(number)
    least_blocks = -(-LEAST_SHARED_TOKENS // block_size_tokens)
    groups = []
    for numbers in by_first_block.values():
        if len(numbers) > 1:
            # Those that share most are neighbours in this order.
            numbers.sort(key=block_tables.__getitem__)
            full_blocks = [first_positions[number] // block_size_tokens for number in numbers]
            in_common = [
                _num_equal(block_tables[one], block_tables[other], min(most))
                for (one, other), most in zip(pairwise(numbers), pairwise(full_blocks), strict=True)
            ]
            groups += _groups(numbers, in_common, least_blocks)
    if sum(group.blocks_saved for group in groups) * block_size_tokens < LEAST_TOKENS_SAVED:
        return []
    return sorted(groups, key=lambda group: -group.blocks_saved)


def _groups(numbers: Sequence[int], in_common: Sequence[int], least_blocks: int) -> list[SharedPrefix]:
    """Take neighbours together, with what all of them share, or apart, where these share more: as more is saved.

    `in_common`: blocks that each has in common with the next one.
    """
    if not in_common:
        return []
    depth = min(in_common)
    apart, begin = [], 0
    for end, blocks in enumerate((*in_common, depth), 1):
        if blocks == depth:
            apart += _groups(numbers[begin:end], in_common[begin : end - 1], least_blocks)
            begin = end
    together = SharedPrefix(tuple(numbers), depth)
    if depth >= least_blocks and together.blocks_saved >= sum(group.blocks_saved for group in apart):
        return [together]
    return apart


def _num_equal(one: tuple[BlockId, ...], other: tuple[BlockId, ...], most: int) -> int:
    """How many blocks two tables begin with in common, at most `most`."""
    if one[:most] == other[:most]:
        return most
    return next(index for index in range(most) if one[index] != other[index])


def tiles_of(groups: Sequence[SharedPrefix], most_members: int, most_tiles: int) -> list[SharedPrefix]:
    """Deal out each group's members to tiles of the kernel; groups that no tile is left for are attended one by one."""
    tiles: list[SharedPrefix] = []
    for group in groups:
        own = [
            SharedPrefix(group.members[first : first + most_members], group.num_blocks)
            for first in range(0, len(group.members), most_members)
        ]
        if len(tiles) + len(own) <= most_tiles:
            tiles += own
    return tiles
