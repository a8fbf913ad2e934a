"""Attention over the paged cache gives what the plain formula gives, and reads nothing that is not its own."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from services.worker.cuda.dense_attention import DenseRun, dense_attention
from services.worker.cuda.step_inputs import Numbers
from services.worker.kernels.decode_attention import (
    DecodeBatch,
    cut_contexts,
    decode_attention,
    decode_attention_reference,
    even_length,
    num_pieces_for,
    piece_results,
)
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.prefill_attention import (
    cut_chunks,
    prefill_attention,
    prefill_attention_reference,
    tile_tokens_for,
)
from tests.gpu.devices import DEVICE, DTYPES, IS_CUDA, assert_near, random, seeded

BLOCK = 64 if IS_CUDA else 16
# Query heads, key heads, length of a head.
HEADS = [(32, 8, 128), (9, 3, 64), (4, 4, 80)] if IS_CUDA else [(4, 2, 16), (3, 1, 48)]
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 7 * BLOCK + 5]
KV_DTYPES = [*DTYPES, torch.float8_e4m3fn]


def a_cache(
    lengths: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 1, block: int = BLOCK
) -> tuple[PagedLayer, Tensor]:
    """A layer with contexts in blocks in random order, and NaN in every slot that is none of theirs."""
    counts = [-(-length // block) for length in lengths]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=seeded(seed))
    kv = torch.full((num_blocks, 2, num_kv_heads, block, head_dim), math.nan)
    tables = torch.full((len(lengths), max(counts)), num_blocks - 1, dtype=torch.int32)
    taken = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = order[taken : taken + count]
        taken += count
        tables[row, :count] = blocks.to(torch.int32)
        own = torch.randn((2, num_kv_heads, count * block, head_dim), generator=seeded(seed + row + 1))
        own[:, :, length:] = math.nan
        kv[blocks] = own.view(2, num_kv_heads, count, block, head_dim).permute(2, 0, 1, 3, 4)
    return PagedLayer(kv.to(dtype).to(DEVICE)), tables.to(DEVICE)


def queries_of(dtype: torch.dtype) -> torch.dtype:
    return DTYPES[1] if dtype == torch.float8_e4m3fn else dtype


def a_batch(first_tokens: Numbers, contexts: Numbers, most_pieces: int, tables: Tensor) -> DecodeBatch:
    """What a launch is told of contexts, some pieces for nothing among it."""
    pieces, splits = cut_contexts(
        first_tokens, contexts, even_length(contexts - first_tokens, most_pieces, BLOCK, BLOCK)
    )
    filled = np.full((most_pieces + 2, 4), -1, dtype=np.int32)
    filled[: len(pieces)] = pieces
    splits = np.pad(splits, ((0, 0), (0, 2)))
    return DecodeBatch(torch.from_numpy(filled).to(DEVICE), torch.from_numpy(splits).to(DEVICE), tables)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize(("most_pieces", "window"), [(6, None), (17, None), (17, BLOCK + 3)])
def test_a_batch_of_any_lengths_attends_in_one_launch(
    heads: tuple[int, int, int], dtype: torch.dtype, most_pieces: int, window: int | None
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer, tables = a_cache(LENGTHS, num_kv_heads, head_dim, dtype)
    queries = random(seeded(7), len(LENGTHS), num_heads, head_dim, dtype=queries_of(dtype))
    contexts = np.array(LENGTHS, dtype=np.int32)
    batch = a_batch(np.zeros_like(contexts), contexts, most_pieces, tables)
    room = piece_results(len(batch.pieces), len(LENGTHS), num_heads, num_kv_heads, head_dim, DEVICE)
    room.sums.fill_(math.nan)
    room.log_weights.fill_(math.nan)
    expected = decode_attention_reference(queries, layer, torch.from_numpy(contexts), tables, window)
    for _ in range(2):
        out = torch.full_like(queries, math.nan)
        decode_attention(queries, layer, batch, room, out, window)
        assert_near(out, expected)
        assert not room.num_done.any(), "it is left as the next launch needs it"


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (17, 1), (40, 2)])
def test_any_number_of_heads_may_share_a_decodes_keys(num_heads: int, num_kv_heads: int) -> None:
    layer, tables = a_cache(LENGTHS, num_kv_heads, 32, DTYPES[1])
    queries = random(seeded(7), len(LENGTHS), num_heads, 32, dtype=DTYPES[1])
    contexts = np.array(LENGTHS, dtype=np.int32)
    batch = a_batch(np.zeros_like(contexts), contexts, 17, tables)
    assert batch.splits[:, 1].max() > 4, "a merge of two turns"
    room = piece_results(len(batch.pieces), len(LENGTHS), num_heads, num_kv_heads, 32, DEVICE)
    out = torch.full_like(queries, math.nan)
    decode_attention(queries, layer, batch, room, out)
    assert_near(out, decode_attention_reference(queries, layer, torch.from_numpy(contexts), tables, None))


def test_a_row_that_is_computed_for_nothing_changes_nothing() -> None:
    num_heads, num_kv_heads, head_dim = HEADS[0]
    layer, tables = a_cache([3, BLOCK], num_kv_heads, head_dim, torch.float32)
    queries = random(seeded(7), 2, num_heads, head_dim)
    pieces = torch.tensor([[0, 0, 3, 3], [-1, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
    splits = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
    room = piece_results(2, 2, num_heads, num_kv_heads, head_dim, DEVICE)
    out = torch.full_like(queries, 5.0)
    decode_attention(queries, layer, DecodeBatch(pieces, splits, tables), room, out)
    assert (out[1] == 5.0).all()
    assert not (out[0] == 5.0).any()


def test_a_launch_without_any_context_leaves_the_counts_as_the_next_one_needs_them() -> None:
    # As before a graph's capture, when nothing was said of a step yet: all numbers are 0.
    num_heads, num_kv_heads, head_dim = HEADS[0]
    layer, tables = a_cache([3 * BLOCK], num_kv_heads, head_dim, torch.float32)
    queries = random(seeded(7), 1, num_heads, head_dim)
    room = piece_results(4, 1, num_heads, num_kv_heads, head_dim, DEVICE)
    nothing = DecodeBatch(
        torch.zeros((4, 4), dtype=torch.int32, device=DEVICE),
        torch.zeros((1, 4), dtype=torch.int32, device=DEVICE),
        tables,
    )
    decode_attention(queries, layer, nothing, room, torch.empty_like(queries))
    assert not room.num_done.any()


@pytest.mark.parametrize("most_pieces", [5, 6, 9, 40, 300])
def test_contexts_are_cut_into_pieces_that_cover_them_once(most_pieces: int) -> None:
    contexts = np.array([1, 700, 64, 65, 4096], dtype=np.int32)
    first_tokens = np.array([0, 64, 0, 64, 2048], dtype=np.int32)
    pieces, splits = cut_contexts(first_tokens, contexts, even_length(contexts - first_tokens, most_pieces, 64, 128))
    assert len(pieces) <= most_pieces
    for row, (first, count) in enumerate(splits):
        own = pieces[first : first + count]
        assert (own[:, 0] == row).all()
        assert (own[:, 3] == contexts[row]).all()
        assert own[0, 1] == first_tokens[row]
        assert own[-1, 2] == contexts[row]
        assert (own[1:, 1] == own[:-1, 2]).all()
        assert (own[:, 1] % 64 == 0).all()
        assert (own[:-1, 2] - own[:-1, 1] >= 128).all()


def test_the_longest_contexts_pieces_begin_first_and_the_shortest_last() -> None:
    contexts = np.array([90, 700, 64, 4096], dtype=np.int32)
    pieces, splits = cut_contexts(np.zeros_like(contexts), contexts, 512)
    assert pieces[:, 0].tolist() == [3] * 8 + [1] * 2 + [0, 2]
    assert splits.tolist() == [[10, 1], [8, 2], [11, 1], [0, 8]]


@pytest.mark.parametrize("is_fp8", [False, True])
def test_few_contexts_have_pieces_to_spare_so_that_a_long_one_is_cut(is_fp8: bool) -> None:
    contexts = np.array([400] * 9 + [4096], dtype=np.int32)
    assert even_length(contexts, num_pieces_for(len(contexts), is_fp8), 64, 64) <= 512


@pytest.mark.parametrize("is_fp8", [False, True])
def test_more_contexts_never_have_fewer_pieces_so_that_what_fills_up_a_step_has_room_for_fewer(is_fp8: bool) -> None:
    pieces = [num_pieces_for(num_rows, is_fp8) for num_rows in range(600)]
    assert pieces == sorted(pieces)
    assert all(count > num_rows for num_rows, count in enumerate(pieces) if num_rows)


def attend_to_chunks(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None, block: int
) -> tuple[Tensor, Tensor]:
    """What kernel and formula give for whole prompts, chunks behind cached tokens, and one token."""
    num_heads, num_kv_heads, head_dim = heads
    first_positions = np.array([0, 2 * block, 5, 0, block - 1], dtype=np.int32)
    num_tokens = np.array([2 * block + 3, block, 70, 1, 2], dtype=np.int32)
    first_rows = (np.cumsum(num_tokens) - num_tokens).astype(np.int32)
    lengths = (first_positions + num_tokens).tolist()
    layer, tables = a_cache(lengths, num_kv_heads, head_dim, dtype, block=block)
    cut = cut_chunks(first_rows, num_tokens, first_positions, tile_tokens_for(num_heads, num_kv_heads))
    tiles = torch.from_numpy(cut).to(DEVICE)
    nothing = torch.zeros((2, 4), dtype=torch.int32, device=DEVICE)
    queries = random(seeded(7), int(num_tokens.sum()), num_heads, head_dim, dtype=queries_of(dtype))
    out = torch.full_like(queries, math.nan)
    prefill_attention(queries, layer, torch.cat((tiles, nothing)), tables, out, window)
    return out, prefill_attention_reference(queries, layer, tiles, tables, window)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [None, BLOCK + 3])
def test_chunks_attend_to_what_is_before_them_and_to_themselves(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    assert_near(*attend_to_chunks(heads, dtype, window, BLOCK))


@pytest.mark.parametrize("heads", [(1, 1, 256), (8, 1, 64), (15, 3, 32)])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_any_number_of_heads_may_share_keys_and_blocks_may_have_any_size(
    heads: tuple[int, int, int], block: int
) -> None:
    assert_near(*attend_to_chunks(heads, DTYPES[1], None, block))


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_row_attends_the_same_wherever_its_chunk_begins(dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = HEADS[0]
    length = 2 * BLOCK + 3
    layer, tables = a_cache([length], num_kv_heads, head_dim, dtype)
    queries = random(seeded(7), length, num_heads, head_dim, dtype=queries_of(dtype))

    def attended(*sizes: int) -> Tensor:
        out = torch.full_like(queries, math.nan)
        for first, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            row, count = np.array([first], dtype=np.int32), np.array([size], dtype=np.int32)
            cut = cut_chunks(row, count, row, tile_tokens_for(num_heads, num_kv_heads))
            prefill_attention(queries, layer, torch.from_numpy(cut).to(DEVICE), tables, out)
        return out

    whole = attended(length)
    for begin in (1, BLOCK - 3, BLOCK, BLOCK + 7, length - 1):
        assert torch.equal(attended(begin, length - begin), whole), f"a chunk that begins at {begin}"


def test_both_kernels_agree_on_one_token() -> None:
    num_heads, num_kv_heads, head_dim = HEADS[0]
    layer, tables = a_cache(LENGTHS, num_kv_heads, head_dim, torch.float32)
    contexts = torch.tensor(LENGTHS)
    queries = random(seeded(7), len(LENGTHS), num_heads, head_dim)
    rows = np.arange(len(LENGTHS), dtype=np.int32)
    cut = cut_chunks(rows, np.ones_like(rows), np.array(LENGTHS, dtype=np.int32) - 1, tile_tokens=1)
    tiles = torch.from_numpy(cut).to(DEVICE)
    expected = decode_attention_reference(queries, layer, contexts, tables, None)
    assert_near(prefill_attention_reference(queries, layer, tiles, tables, None), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="cuDNN is the device's")
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_whole_prompts_are_attended_by_cudnn(num_sequences: int) -> None:
    num_heads, num_kv_heads, head_dim = HEADS[0]
    num_rows = 5 + num_sequences * 512
    qkv = random(seeded(3), num_rows, num_heads + 2 * num_kv_heads, head_dim, dtype=torch.bfloat16)
    queries, keys, values = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    attended = dense_attention(queries.contiguous(), keys, values, DenseRun(5, num_sequences, 512))
    assert attended.is_contiguous()
    by_sequence = (num_sequences, 512)
    group = num_heads // num_kv_heads
    q, k, v = (x[5:].float().unflatten(0, by_sequence).transpose(1, 2) for x in (queries, keys, values))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_near(attended, expected.transpose(1, 2).flatten(0, 1), torch.bfloat16)
