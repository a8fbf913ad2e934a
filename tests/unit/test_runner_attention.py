"""Paged attention is attention: over any blocks, any sizes, and prefill mixed with decode."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.runner.attention import paged_attention
from services.worker.runner.batch import BatchInputs, make_batch
from services.worker.runner.decode_attention import DecodeGroup
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.prefill_attention import TILE_TOKENS, PrefillChunk

GREEDY = SamplingParameters(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, choice=0)
NUM_BLOCKS = 64


def a_config(num_heads: int = 6, num_kv_heads: int = 2, window: int | None = None) -> DecoderConfig:
    return DecoderConfig(
        num_layers=2,
        hidden_size=num_heads * 8,
        intermediate_size=32,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        vocabulary_size=100,
        context_tokens=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=window,
    )


def naive_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One token's attention, head by head. query: [heads, dim]; keys, values: [context, kv_heads, dim]."""
    heads_per_kv_head = query.shape[0] // keys.shape[1]
    outputs = []
    for head, q in enumerate(query):
        kv_head = head // heads_per_kv_head
        weights = (keys[:, kv_head] @ q / q.shape[0] ** 0.5).softmax(dim=0)
        outputs.append(weights @ values[:, kv_head])
    return torch.stack(outputs)


def a_chunk(sequence_id: int, first_position: int, num_tokens: int, blocks: Sequence[int]) -> SequenceChunk:
    table = tuple(BlockId(block) for block in blocks)
    return SequenceChunk(
        SequenceId(sequence_id), tuple(range(num_tokens)), first_position, table, GREEDY, sample_index=0
    )


def write(cache: PagedKvCache, layer: int, slots: Sequence[int], kv: Tensor) -> None:
    """Store keys and values of tokens: [num_tokens, 2, kv_heads, dim]."""
    cache.write(layer, cache.write_rows(torch.tensor(slots)), kv.flatten(1, 2))


def check(config: DecoderConfig, block_size_tokens: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Compare chunks, given as (first position, tokens), with naive attention over the same keys and values."""
    window = config.sliding_window
    generator = torch.Generator().manual_seed(len(sizes))
    cache = PagedKvCache(config, NUM_BLOCKS, block_size_tokens)
    free_blocks = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    chunks, contexts = [], []
    for sequence_id, (first_position, num_tokens) in enumerate(sizes):
        num_context_blocks = -(-(first_position + num_tokens) // block_size_tokens)
        blocks = [free_blocks.pop() for _ in range(num_context_blocks)]
        chunks.append(a_chunk(sequence_id, first_position, num_tokens, blocks))
        kv = torch.randn((first_position + num_tokens, 2, config.num_kv_heads, config.head_dim), generator=generator)
        slots = [blocks[p // block_size_tokens] * block_size_tokens + p % block_size_tokens for p in range(len(kv))]
        write(cache, 1, slots, kv)
        contexts.append(kv)
    batch = make_batch(StepPlan(1, tuple(chunks)), cache)
    num_rows = sum(num_tokens for _, num_tokens in sizes)
    queries = torch.randn((num_rows, config.num_heads, config.head_dim), generator=generator)
    attended = paged_attention(queries, cache, 1, batch.sliding_groups if window else batch.attention_groups)
    last_rows = batch.sample_rows.tolist()
    for kv, (first_position, num_tokens), last_row in zip(contexts, sizes, last_rows, strict=True):
        for place in range(num_tokens):
            row = last_row - num_tokens + 1 + place
            num_seen = first_position + place + 1
            context = kv[max(0, num_seen - window) if window else 0 : num_seen]
            expected = naive_attention(queries[row], context[:, 0], context[:, 1])
            torch.testing.assert_close(attended[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block_size_tokens", [1, 4, 7, 16])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 15, 16, 17])
@pytest.mark.parametrize("first_position", [0, 1, 6, 16])
def test_one_chunk_of_any_size(block_size_tokens: int, num_tokens: int, first_position: int) -> None:
    check(a_config(), block_size_tokens, [(first_position, num_tokens)])


@pytest.mark.parametrize("num_tokens", [TILE_TOKENS, TILE_TOKENS + 1, 3 * TILE_TOKENS - 1])
@pytest.mark.parametrize("first_position", [0, 1, 100])
@pytest.mark.parametrize("window", [None, 50, TILE_TOKENS + 5])
def test_chunks_of_several_tiles(num_tokens: int, first_position: int, window: int | None) -> None:
    check(a_config(window=window), 16, [(first_position, num_tokens)])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 1), (9, 3)])
def test_any_sharing_of_key_heads(num_heads: int, num_kv_heads: int) -> None:
    check(a_config(num_heads, num_kv_heads), 4, [(5, 3), (9, 1), (0, 1)])


def test_decodes_of_very_different_contexts_with_prefill_between() -> None:
    check(a_config(), 4, [(0, 1), (40, 1), (3, 1), (0, 9), (4, 1), (7, 1), (8, 1), (10, 6), (30, 1), (31, 1)])


@pytest.mark.parametrize("window", [1, 3, 4, 5, 30, 100])
@pytest.mark.parametrize("block_size_tokens", [3, 4, 7])
def test_a_window_hides_all_but_the_last_tokens(window: int, block_size_tokens: int) -> None:
    sizes = [(0, 1), (20, 9), (3, 1), (0, 9), (4, 1), (7, 1), (10, 6), (30, 1), (31, 1)]
    check(a_config(window=window), block_size_tokens, sizes)


def test_what_lies_before_a_chunks_window_is_not_even_read() -> None:
    config = a_config(window=5)
    cache = PagedKvCache(config, NUM_BLOCKS, 4)
    chunks = (a_chunk(1, 39, 1, range(10)), a_chunk(2, 36, 1, range(10, 20)), a_chunk(3, 20, 8, range(20, 27)))
    for first_seen, chunk in zip((35, 32, 16), chunks, strict=True):
        unseen = [chunk.block_table[p // 4] * 4 + p % 4 for p in range(first_seen)]
        write(cache, 0, unseen, torch.full((len(unseen), 2, config.num_kv_heads, 8), float("nan")))
    batch = make_batch(StepPlan(1, chunks), cache)
    attended = paged_attention(torch.ones((10, config.num_heads, 8)), cache, 0, batch.sliding_groups)
    assert bool(attended.isfinite().all())


@settings(max_examples=50, deadline=None)
@given(contexts=st.lists(st.integers(1, 120), min_size=2, max_size=12), seed=st.integers(0, 1000))
@example(contexts=[*range(5, 17)], seed=0)
@example(contexts=[3, 4, 6, 7, 9, 11, 13, 15, 16], seed=1)
def test_a_decodes_attention_is_bit_for_bit_the_same_in_any_company(contexts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = a_config()
    cache = PagedKvCache(config, 12 * 8, 16)
    write(cache, 0, range(12 * 128), torch.randn((12 * 128, 2, config.num_kv_heads, 8), generator=generator))
    queries = torch.randn((len(contexts), config.num_heads, 8), generator=generator)
    chunks = [a_chunk(i, context - 1, 1, range(8 * i, 8 * i + 8)) for i, context in enumerate(contexts)]
    batch = make_batch(StepPlan(1, tuple(chunks)), cache)
    rows = batch.sample_rows
    inputs = torch.empty_like(queries)
    inputs[rows] = queries
    together = paged_attention(inputs, cache, 0, batch.attention_groups)[rows]
    for chunk, query, among_others in zip(chunks, queries, together, strict=True):
        alone = make_batch(StepPlan(1, (chunk,)), cache)
        assert torch.equal(paged_attention(query[None], cache, 0, alone.attention_groups)[0], among_others)


def test_a_neighbour_of_the_last_token_in_its_block_is_not_seen() -> None:
    config = a_config()
    cache = PagedKvCache(config, NUM_BLOCKS, 4)
    kv = torch.randn((4, 2, config.num_kv_heads, config.head_dim))
    write(cache, 0, range(4), kv)
    batch = make_batch(StepPlan(1, (a_chunk(0, 1, 1, [0]),)), cache)
    queries = torch.randn((1, config.num_heads, config.head_dim))
    before = paged_attention(queries, cache, 0, batch.attention_groups)
    write(cache, 0, [2, 3], kv[2:] * 1000)
    assert torch.equal(paged_attention(queries, cache, 0, batch.attention_groups), before)


def a_batch(*chunks: SequenceChunk) -> BatchInputs:
    return make_batch(StepPlan(1, chunks), PagedKvCache(a_config(), NUM_BLOCKS, block_size_tokens=4))


def test_a_batch_says_for_each_row_its_token_and_its_position() -> None:
    batch = a_batch(a_chunk(1, 6, 3, [9, 5, 7]))
    assert batch.token_ids.tolist() == [0, 1, 2]
    assert batch.positions.tolist() == [6, 7, 8]
    assert batch.sample_rows.tolist() == [2]


def test_samples_are_in_the_plans_order_though_rows_are_not() -> None:
    batch = a_batch(a_chunk(1, 0, 5, [1, 2]), a_chunk(2, 3, 1, [3]), a_chunk(3, 0, 2, [4]))
    assert batch.sample_rows.tolist() == [5, 0, 7]


def test_decodes_of_like_contexts_are_one_group_and_long_chunks_are_alone() -> None:
    batch = a_batch(
        a_chunk(1, 17, 1, [0, 1, 2, 3, 4]),
        a_chunk(2, 31, 1, [5, 6, 7, 8, 9, 10, 11, 12]),
        a_chunk(3, 2, 1, [13]),
        a_chunk(4, 0, 4, [14]),
        a_chunk(5, 0, 4, [15]),
    )
    groups = [(type(group), group.first_row, group.num_tokens) for group in batch.attention_groups]
    assert groups == [(DecodeGroup, 0, 1), (DecodeGroup, 1, 2), (PrefillChunk, 3, 4), (PrefillChunk, 7, 4)]
