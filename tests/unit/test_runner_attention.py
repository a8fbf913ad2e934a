"""Paged attention is attention: over any blocks, any sizes, and prefill mixed with decode."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.runner.batch import BatchInputs, make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.decoder_weights import DecoderConfig
from tests.unit.instruction_sets import instruction_set
from tests.unit.kernels_alone import paged_attention

__all__ = ["instruction_set"]

GREEDY = SamplingParameters(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, choice=0)


def a_config(num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 8) -> DecoderConfig:
    return DecoderConfig(
        num_layers=2,
        hidden_size=num_heads * head_dim,
        intermediate_size=32,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocabulary_size=100,
        context_tokens=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
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
    config, size = cache.config, cache.block_size_tokens
    of_blocks = cache.layer(layer)
    keys = of_blocks[:, 0].view(-1, config.num_kv_heads, config.head_dim, size)
    values = of_blocks[:, 1].view(-1, config.num_kv_heads, size, config.head_dim)
    for slot, (key, value) in zip(slots, kv, strict=True):
        keys[slot // size, :, :, slot % size] = key
        values[slot // size, :, slot % size] = value


def a_cache(config: DecoderConfig, num_blocks: int, block_size_tokens: int) -> PagedKvCache:
    """A cache that holds no number yet: whatever is read of others' slots would show."""
    cache = PagedKvCache(config, num_blocks, block_size_tokens)
    cache.layer(0).fill_(float("nan"))
    cache.layer(1).fill_(float("nan"))
    return cache


def some_qkv(config: DecoderConfig, num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return queries, [rows, heads, dim], and rows that hold them, with keys and values that are not to be read."""
    queries = torch.randn((num_rows, config.num_heads, config.head_dim), generator=generator)
    unread = torch.full((num_rows, 2 * config.num_kv_heads, config.head_dim), float("nan"))
    return queries, torch.cat((queries, unread), dim=1).flatten(1)


def check(
    config: DecoderConfig, block_size_tokens: int, sizes: Sequence[tuple[int, int]], window: int | None = None
) -> None:
    """Compare chunks, given as (first position, tokens), with naive attention over the same keys and values."""
    generator = torch.Generator().manual_seed(len(sizes))
    num_blocks = [-(-(first_position + num_tokens) // block_size_tokens) for first_position, num_tokens in sizes]
    cache = a_cache(config, sum(num_blocks), block_size_tokens)
    free_blocks = torch.randperm(sum(num_blocks), generator=generator).tolist()
    chunks, contexts = [], []
    for sequence_id, (first_position, num_tokens) in enumerate(sizes):
        blocks = [free_blocks.pop() for _ in range(num_blocks[sequence_id])]
        chunks.append(a_chunk(sequence_id, first_position, num_tokens, blocks))
        kv = torch.randn((first_position + num_tokens, 2, config.num_kv_heads, config.head_dim), generator=generator)
        slots = [blocks[p // block_size_tokens] * block_size_tokens + p % block_size_tokens for p in range(len(kv))]
        write(cache, 1, slots, kv)
        contexts.append(kv)
    batch = make_batch(StepPlan(1, tuple(chunks)), cache)
    queries, qkv = some_qkv(config, sum(num_tokens for _, num_tokens in sizes), generator)
    attended = paged_attention(qkv, batch, cache, 1, window).view(queries.shape)
    row = 0
    for kv, (first_position, num_tokens) in zip(contexts, sizes, strict=True):
        for num_seen in range(first_position + 1, first_position + num_tokens + 1):
            context = kv[max(0, num_seen - window) if window else 0 : num_seen]
            expected = naive_attention(queries[row], context[:, 0], context[:, 1])
            torch.testing.assert_close(attended[row], expected, atol=1e-5, rtol=1e-4)
            row += 1


@pytest.mark.parametrize("block_size_tokens", [1, 4, 7, 16])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 15, 16, 17])
@pytest.mark.parametrize("first_position", [0, 1, 6, 16])
def test_one_chunk_of_any_size(block_size_tokens: int, num_tokens: int, first_position: int) -> None:
    check(a_config(), block_size_tokens, [(first_position, num_tokens)])


@pytest.mark.parametrize("num_tokens", [30, 64, 191])
@pytest.mark.parametrize("first_position", [0, 1, 100])
@pytest.mark.parametrize("window", [None, 50, 69])
def test_chunks_of_several_tiles(num_tokens: int, first_position: int, window: int | None) -> None:
    check(a_config(), 16, [(first_position, num_tokens)], window)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 1), (9, 3), (14, 2), (32, 1)])
def test_any_sharing_of_key_heads(num_heads: int, num_kv_heads: int) -> None:
    check(a_config(num_heads, num_kv_heads), 4, [(5, 3), (9, 1), (0, 1)])


@pytest.mark.parametrize("head_dim", [2, 10, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size_tokens", [5, 16, 32])
def test_heads_of_any_size(head_dim: int, block_size_tokens: int) -> None:
    check(a_config(head_dim=head_dim), block_size_tokens, [(5, 3), (70, 1), (0, 33)])


def test_decodes_of_very_different_contexts_with_prefill_between() -> None:
    check(a_config(), 4, [(0, 1), (40, 1), (3, 1), (0, 9), (4, 1), (7, 1), (8, 1), (10, 6), (2000, 1), (31, 1)])


@pytest.mark.parametrize("window", [1, 3, 4, 5, 30, 100])
@pytest.mark.parametrize("block_size_tokens", [3, 4, 7])
def test_a_window_hides_all_but_the_last_tokens(window: int, block_size_tokens: int) -> None:
    sizes = [(0, 1), (20, 9), (3, 1), (0, 9), (4, 1), (7, 1), (10, 6), (30, 1), (31, 1)]
    check(a_config(), block_size_tokens, sizes, window)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_scores_of_any_size(size: float) -> None:
    config = a_config()
    cache = a_cache(config, 3, 16)
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn((40, 2, config.num_kv_heads, config.head_dim), generator=generator)
    kv[:, 0] *= size
    write(cache, 0, range(40), kv)
    queries, qkv = some_qkv(config, 1, generator)
    batch = make_batch(StepPlan(1, (a_chunk(0, 39, 1, range(3)),)), cache)
    attended = paged_attention(qkv, batch, cache, 0, None).view(queries.shape)
    torch.testing.assert_close(attended[0], naive_attention(queries[0], kv[:, 0], kv[:, 1]), atol=1e-5, rtol=1e-3)


def test_what_lies_before_a_chunks_window_is_not_even_read() -> None:
    config = a_config()
    cache = a_cache(config, 27, 4)
    chunks = (a_chunk(1, 39, 1, range(10)), a_chunk(2, 36, 1, range(10, 20)), a_chunk(3, 20, 8, range(20, 27)))
    for first_seen, chunk in zip((35, 32, 16), chunks, strict=True):
        seen = [chunk.block_table[p // 4] * 4 + p % 4 for p in range(first_seen, chunk.context_tokens)]
        write(cache, 0, seen, torch.ones((len(seen), 2, config.num_kv_heads, config.head_dim)))
    _, qkv = some_qkv(config, 10, torch.Generator().manual_seed(0))
    attended = paged_attention(qkv, make_batch(StepPlan(1, chunks), cache), cache, 0, 5)
    torch.testing.assert_close(attended, torch.ones_like(attended))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 80), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=9),
    window=st.one_of(st.none(), st.integers(1, 60)),
    seed=st.integers(0, 1000),
)
def test_a_tokens_attention_is_bit_for_bit_the_same_in_any_company_and_chunk(
    sizes: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = a_config()
    cache = PagedKvCache(config, 9 * 8, 16)
    cache.layer(0).normal_(generator=generator)
    chunks = [
        a_chunk(i, first_position, num_tokens, range(8 * i, 8 * i + 8))
        for i, (first_position, num_tokens) in enumerate(sizes)
    ]
    _, qkv = some_qkv(config, sum(num_tokens for _, num_tokens in sizes), generator)
    together = paged_attention(qkv, make_batch(StepPlan(1, tuple(chunks)), cache), cache, 0, window)
    row = 0
    for i, (first_position, num_tokens) in enumerate(sizes):
        for position in range(first_position, first_position + num_tokens):
            alone = make_batch(StepPlan(1, (a_chunk(i, position, 1, range(8 * i, 8 * i + 8)),)), cache)
            assert torch.equal(paged_attention(qkv[row : row + 1], alone, cache, 0, window)[0], together[row])
            row += 1


def a_batch(*chunks: SequenceChunk) -> BatchInputs:
    return make_batch(StepPlan(1, chunks), PagedKvCache(a_config(), 64, block_size_tokens=4))


def test_a_batch_says_for_each_row_its_token_its_position_and_its_slot() -> None:
    batch = a_batch(a_chunk(1, 6, 3, [9, 5, 7]), a_chunk(2, 3, 1, [3]))
    assert batch.token_ids.tolist() == [0, 1, 2, 0]
    assert batch.positions.tolist() == [6, 7, 8, 3]
    assert batch.slots.tolist() == [4 * 5 + 2, 4 * 5 + 3, 4 * 7, 4 * 3 + 3]


def test_a_batch_says_after_which_rows_something_is_sampled_or_scored() -> None:
    prompt = a_chunk(1, 6, 3, [9, 5, 7])._replace(sample_index=None)
    scored = a_chunk(2, 2, 3, [3, 4])._replace(scored_token_ids=(5, 6))
    batch = a_batch(prompt, scored, a_chunk(3, 3, 1, [8]))
    assert batch.wanted_rows.tolist() == [3, 4, 5, 6]
    assert batch.wanted_tiles.tolist() == [[0, 1, 2, 3], [1, 1, 3, 3], [2, 1, 4, 3], [3, 1, 3, 5]]
    assert batch.sampled.tolist() == [2, 3]
    assert batch.scored.tolist() == [0, 1]


def test_a_chunk_is_attended_in_tiles_that_know_their_blocks() -> None:
    # 24 queries, 3 a token that share a head of keys: 8 tokens.
    batch = a_batch(a_chunk(1, 3, 1, [9]), a_chunk(2, 2, 17, [1, 2, 3, 4, 5]))
    assert batch.tiles.tolist() == [[0, 1, 3, 0], [1, 8, 2, 1], [9, 8, 10, 1], [17, 1, 18, 1]]
    assert batch.block_tables.tolist() == [9, 1, 2, 3, 4, 5]
