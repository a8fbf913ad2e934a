"""A prefix that is read once for several sequences gives each of them what plain attention gives it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.cuda.shared_prefixes import SharedPrefix, tiles_of
from services.worker.cuda.step_inputs import StepLayout, decode_batch, fill, views
from services.worker.cuda.step_shapes import StepShape
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk
from services.worker.kernels.decode_attention import decode_attention, decode_attention_reference, piece_results
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.shared_attention import (
    members_of_piece,
    shared_attention,
    shared_attention_reference,
    shared_results,
)
from tests.gpu.devices import DEVICE, DTYPES, IS_CUDA, assert_near, random, seeded

BLOCK = 64 if IS_CUDA else 16
# Query heads, key heads, length of a head.
HEADS = [(32, 8, 128), (9, 3, 64), (4, 4, 80)] if IS_CUDA else [(4, 2, 16), (3, 1, 24)]
KV_DTYPES = [*DTYPES, torch.float8_e4m3fn]
EXAMPLES = 25 if IS_CUDA else 8


def queries_of(dtype: torch.dtype) -> torch.dtype:
    return DTYPES[1] if dtype == torch.float8_e4m3fn else dtype


def a_cache(
    tables: Sequence[Sequence[int]], contexts: Sequence[int], heads: tuple[int, int, int], dtype: torch.dtype
) -> PagedLayer:
    """A layer with NaN in every block that no table names, and behind the end of every context."""
    _, num_kv_heads, head_dim = heads
    num_blocks = max(map(max, tables)) + 3
    kv = torch.randn((num_blocks, 2, num_kv_heads, BLOCK, head_dim), generator=seeded(5))
    kv[list(set(range(num_blocks)) - {block for table in tables for block in table})] = math.nan
    for table, context in zip(tables, contexts, strict=True):
        if context % BLOCK:
            kv[table[context // BLOCK], :, :, context % BLOCK :] = math.nan
    return PagedLayer(kv.to(dtype).to(DEVICE))


def attend(
    queries: Tensor,
    layer: PagedLayer,
    tables: Sequence[Sequence[int]],
    contexts: Sequence[int],
    groups: Sequence[SharedPrefix],
) -> Tensor:
    """As a step does, with some rows more, which are computed for nothing."""
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = layer.kv.shape[2]
    width = max(map(len, tables))
    layout = StepLayout(width * BLOCK, BLOCK, layer.is_fp8, False, False, BLOCK)
    chunks = [
        SequenceChunk(SequenceId(number), (1,), context - 1, tuple(map(BlockId, table)), SamplingParameters(), 1)
        for number, (table, context) in enumerate(zip(tables, contexts, strict=True))
    ]
    sizes = StepShape(num_rows + 2, num_rows + 2, shares=True).sizes(layout, num_rows)
    numbers = np.full(sizes.num_numbers, -1, dtype=np.int32)
    padded = np.array([[*table, *[0] * (width - len(table))] for table in tables], dtype=np.int32)
    tiles = tiles_of(groups, members_of_piece(num_heads, num_kv_heads), sizes.num_shared_pieces)
    assert sum(len(tile.members) for tile in tiles) == sum(len(group.members) for group in groups)
    fill(views(numbers, sizes), chunks, np.arange(num_rows, dtype=np.int32), padded, None, tiles, layout)
    step = views(torch.from_numpy(numbers).to(DEVICE), sizes)
    own_room = piece_results(sizes.num_pieces, num_rows + 2, num_heads, num_kv_heads, head_dim, DEVICE)
    room = shared_results(sizes.num_shared_pieces, num_heads, head_dim, DEVICE)
    for values in (own_room.sums, own_room.log_weights, room.sums, room.log_weights):
        values.fill_(math.nan)
    queries = torch.cat((queries, queries[:2]))
    out = torch.full_like(queries, math.nan)
    shared_attention(queries, layer, step.shared_pieces, step.block_tables, room, pdl=IS_CUDA)
    decode_attention(queries, layer, decode_batch(step), own_room, out, shared=room, pdl=IS_CUDA)
    assert not own_room.num_done.any()
    assert out[num_rows:].isnan().all(), "rows for nothing are left as they are"
    return out[:num_rows]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_grouping_gives_what_plain_attention_gives(
    heads: tuple[int, int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    # Rows hang on prompts of one to five blocks; each has up to two more of its own, the last one not always full.
    most_rows = 70 if IS_CUDA else 7
    prompts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="blocks of prompts")
    of_row = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=2, max_size=most_rows), label="prompts")
    own = [data.draw(st.integers(1, 2 * BLOCK), label="own tokens") for _ in of_row]
    tables = [
        [10 * prompt + block for block in range(prompts[prompt])] + [100 + 2 * row, 101 + 2 * row]
        for row, prompt in enumerate(of_row)
    ]
    contexts = [prompts[prompt] * BLOCK + tokens for prompt, tokens in zip(of_row, own, strict=True)]
    tables = [table[: -(-context // BLOCK)] for table, context in zip(tables, contexts, strict=True)]
    # In random order, and not always with all of those that could, nor all of what they share.
    groups = []
    for prompt, blocks in enumerate(prompts):
        members = data.draw(st.permutations([row for row, own_prompt in enumerate(of_row) if own_prompt == prompt]))
        members = members[: data.draw(st.integers(0, len(members)), label="members")]
        if len(members) > 1:
            groups.append(SharedPrefix(tuple(members), data.draw(st.integers(1, blocks), label="blocks shared")))
    layer = a_cache(tables, contexts, heads, dtype)
    queries = random(seeded(7), len(tables), heads[0], heads[2], dtype=queries_of(dtype))
    width = max(map(len, tables))
    padded = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], device=DEVICE)
    expected = decode_attention_reference(queries, layer, torch.tensor(contexts), padded, None)
    assert_near(attend(queries, layer, tables, contexts, groups), expected)


def test_a_piece_has_a_result_for_each_of_its_members() -> None:
    heads = HEADS[0]
    tables = [[0, 1, 2], [0, 1, 3], [5, 6, 7]]
    layer = a_cache(tables, [3 * BLOCK] * 3, heads, torch.float32)
    queries = random(seeded(7), 3, heads[0], heads[2])
    pieces = torch.zeros((3, 20), dtype=torch.int32, device=DEVICE)
    pieces[0, :6] = torch.tensor([2, BLOCK, 2 * BLOCK, 0, 1, 0])
    pieces[2, :5] = torch.tensor([1, 0, BLOCK, 0, 2])
    block_tables = torch.tensor(tables, dtype=torch.int32, device=DEVICE)
    room = shared_results(3, heads[0], heads[2], DEVICE)
    shared_attention(queries, layer, pieces, block_tables, room)
    expected = shared_attention_reference(queries, layer, pieces, block_tables)
    assert sorted(expected) == [0, 1, 32]
    for slot, (sums, log_weights) in expected.items():
        assert_near(room.sums[slot], sums)
        assert_near(room.log_weights[slot], log_weights)
    assert (room.sums[[2, 16, 33]] == 0).all()
