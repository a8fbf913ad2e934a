"""Which decodes are attended together: those that begin with the same blocks, if that spares enough."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.cuda import shared_prefixes as module
from services.worker.cuda.made_up_steps import every_kind
from services.worker.cuda.shared_prefixes import SharedPrefix, shared_prefixes, tiles_of
from services.worker.engine.block_pool import BlockId
from services.worker.engine.limits import EngineLimits

BLOCK = 64


def a_table(*blocks: int) -> tuple[BlockId, ...]:
    return tuple(map(BlockId, blocks))


def tables_of(num_prefixes: int, num_members: int, prefix_blocks: int) -> list[tuple[BlockId, ...]]:
    """In turn one of each prefix, every one with a block of its own at its end."""
    return [
        a_table(*(1000 * (number % num_prefixes) + block for block in range(prefix_blocks)), 100_000 + number)
        for number in range(num_prefixes * num_members)
    ]


def groups_of(tables: Sequence[tuple[BlockId, ...]]) -> list[SharedPrefix]:
    return shared_prefixes(tables, [len(table) * BLOCK - 1 for table in tables], BLOCK)


def test_each_prompt_that_many_begin_with_is_a_group() -> None:
    groups = groups_of(tables_of(8, 32, 32))
    assert [group.num_blocks for group in groups] == [32] * 8
    assert {group.members for group in groups} == {tuple(range(number, 256, 8)) for number in range(8)}


def test_one_that_shares_less_does_not_spoil_it_for_the_others() -> None:
    tables = [a_table(0, 7), *tables_of(1, 20, 16), a_table(0, 1, 9999)]
    assert groups_of(tables) == [SharedPrefix(tuple(range(1, 21)), 16)]


def test_nothing_is_shared_where_that_spares_little() -> None:
    assert groups_of(tables_of(8, 2, 3)) == []
    assert groups_of(tables_of(1, 3, 40)) == []
    assert groups_of([a_table(number, number + 500) for number in range(256)]) == []


def test_the_block_that_is_written_is_never_shared() -> None:
    tables = [a_table(*range(9))] * 40
    positions = [8 * BLOCK - 1] * 40
    assert shared_prefixes(tables, positions, BLOCK) == [SharedPrefix(tuple(range(40)), 7)]


def test_members_are_dealt_out_to_tiles_as_long_as_there_are_some() -> None:
    groups = [SharedPrefix(tuple(range(20)), 9), SharedPrefix((20, 21), 9), SharedPrefix((22, 23), 8)]
    tiles = [(tuple(range(16)), 9), (tuple(range(16, 20)), 9), ((20, 21), 9)]
    assert [(tile.members, tile.num_blocks) for tile in tiles_of(groups, 16, 3)] == tiles


def in_common(tables: Sequence[tuple[BlockId, ...]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*tables, strict=False)))


def partitions(numbers: list[int]) -> Iterator[list[list[int]]]:
    if not numbers:
        yield []
        return
    for rest in partitions(numbers[1:]):
        yield [[numbers[0]], *rest]
        for index, part in enumerate(rest):
            yield [*rest[:index], [numbers[0], *part], *rest[index + 1 :]]


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=6))
def test_no_other_grouping_would_spare_twice_as_much(paths: list[list[int]]) -> None:
    # A block for each place in a tree of choices.
    tables = [
        a_table(*(int("1" + "".join(map(str, path[: depth + 1])), 2) for depth in range(4)), 100 + number)
        for number, path in enumerate(paths)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_SHARED_TOKENS", 1)
        patch.setattr(module, "LEAST_TOKENS_SAVED", 0)
        groups = groups_of(tables)
    members = [member for group in groups for member in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert in_common([tables[member] for member in group.members]) >= group.num_blocks > 0
    best = max(
        sum((len(part) - 1) * in_common([tables[member] for member in part]) for part in parts if len(part) > 1)
        for parts in partitions(list(range(len(tables))))
    )
    assert 2 * sum(group.blocks_saved for group in groups) >= best


def test_a_worker_warms_up_with_prefixes_that_are_shared() -> None:
    limits = EngineLimits(
        num_blocks=1,
        block_size_tokens=BLOCK,
        max_sequences=256,
        max_prefill_tokens_per_step=8192,
        step_budget_ms=12.0,
        context_tokens=8192,
        vocabulary_size=1000,
    )
    shared = [
        shared_prefixes([d.block_table for d in decodes], [d.first_position for d in decodes], BLOCK)
        for plan in every_kind(limits)
        if (decodes := [chunk for chunk in plan.chunks if len(chunk.token_ids) == 1])
    ]
    # As many as have each form of their attention, alone and beside a prompt.
    assert sorted(len(groups[0].members) for groups in shared if groups) == [23, 23, 47, 47, 65, 65, 128, 128, 225, 225]
