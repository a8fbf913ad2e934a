"""Causal attention of chunks of several tokens over the paged cache (FlashAttention-2, Dao, 2023).

A chunk's keys and values are in the cache already, behind those of the tokens before it. Its queries are cut into tiles
of neighbouring tokens by `cut_chunks`; one launch takes tiles of any chunks. A tile has all query heads of a key head,
so that keys are read once for them. While a tile of keys is weighed, the tensor cores are at the next one's scores
(FlashAttention-3, Shah et al., 2024). Bound by flops.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.tile_product import COPY_BYTES

_LOG2_E = math.log2(math.e)
_LEAST_ROWS = 16
_TILE_ROWS = 64
"""Of 128 dimensions, with the keys and values on their way, so many that a processor has two programs."""
MOST_SHARING_HEADS = _TILE_ROWS
"""Query heads of a key head."""

TILE_COLUMNS = 4
"""Of a tile: the row of its first query, number of queries, position of the first, row of its block table."""


def tile_tokens_for(num_heads: int, num_kv_heads: int) -> int:
    """Return of how many tokens a tile has queries: their heads of a key head fill a product's rows."""
    group = num_heads // num_kv_heads
    assert group <= MOST_SHARING_HEADS
    return _TILE_ROWS // group


def cut_chunks(
    first_rows: NDArray[np.int32], num_tokens: NDArray[np.int32], first_positions: NDArray[np.int32], tile_tokens: int
) -> NDArray[np.int32]:
    """Cut chunks into tiles, those with the longest contexts first: [num_tiles, TILE_COLUMNS]. Chunk i has row i of the
    block tables."""
    counts = -(-num_tokens // tile_tokens)
    chunks = np.repeat(np.arange(len(num_tokens)), counts)
    begins = (np.arange(len(chunks)) - (np.cumsum(counts) - counts)[chunks]) * tile_tokens
    sizes = np.minimum(tile_tokens, num_tokens[chunks] - begins)
    tiles = np.stack((first_rows[chunks] + begins, sizes, first_positions[chunks] + begins, chunks), axis=1)
    return tiles[np.argsort(-tiles[:, 2], kind="stable")].astype(np.int32)


def prefill_attention_reference(
    queries: Tensor, layer: PagedLayer, tiles: Tensor, block_tables: Tensor, window: int | None
) -> Tensor:
    """Return [num_tokens, num_heads, head_dim]. queries: the same; tiles: as of `cut_chunks`."""
    out = torch.zeros_like(queries)
    group = queries.shape[1] // layer.kv.shape[2]
    for first_row, size, first_position, table_row in tiles.tolist():
        keys, values = layer.context(block_tables[table_row], first_position + size)
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        rows = slice(first_row, first_row + size)
        scores = torch.einsum("qhd,thd->hqt", queries[rows].float(), keys) / math.sqrt(queries.shape[2])
        behind = torch.arange(first_position, first_position + size, device=keys.device)[:, None] - torch.arange(
            len(keys), device=keys.device
        )
        is_seen = (behind >= 0) & (behind < (window or len(keys) + 1))
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(dim=2)
        out[rows] = torch.einsum("hqt,thd->qhd", weights, values).to(out.dtype)
    return out


def prefill_attention(
    queries: Tensor,
    layer: PagedLayer,
    tiles: Tensor,
    block_tables: Tensor,
    out: Tensor,
    window: int | None = None,
) -> None:
    """As the reference, into `out`; rows of no tile are left as they are. A tile of 0 queries is none.

    A row's result is the same to the last bit, wherever its chunk begins.
    """
    _, num_heads, head_dim = queries.shape
    num_blocks, _, num_kv_heads, block_size_tokens, _ = layer.kv.shape
    assert queries.is_contiguous()
    assert out.is_contiguous()
    assert head_dim * layer.kv.element_size() % COPY_BYTES == 0, "bulk copies take no such keys"
    block_dim = max(_LEAST_ROWS, triton.next_power_of_2(head_dim))
    # As many as there is shared memory for.
    tile_keys = min(64 if block_dim <= 128 else 32, block_size_tokens)
    assert tile_keys >= _LEAST_ROWS, "the tensor cores take no block of fewer tokens"
    rows_of_blocks = [num_blocks, 2 * num_kv_heads * block_size_tokens, head_dim]
    _prefill_attention[(num_kv_heads, len(tiles))](
        queries,
        TensorDescriptor(layer.kv, rows_of_blocks, [layer.kv.stride(0), head_dim, 1], [1, tile_keys, block_dim]),
        tiles,
        block_tables,
        out,
        block_tables.stride(0),
        _LOG2_E / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_SIZE=block_size_tokens,
        TILE_ROWS=_TILE_ROWS,
        TILE_KEYS=tile_keys,
        WINDOW=window or 0,
        num_warps=4 if queries.dtype.itemsize == 2 else 8,
        num_stages=2 if queries.dtype.itemsize == 2 else 1,
        # A score that is scaled and compared in one instruction is not rounded between, but one that is masked between
        # the two is. And a score that is read again behind the next product keeps that from overlapping.
        enable_fp_fusion=False,
    )


@triton.jit
def _prefill_attention(
    queries,
    kv,
    tiles,
    block_tables,
    out,
    table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (key head, tile). It begins when the kernel in front has ended."""
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    first_row = tl.load(tiles + 4 * tile)
    size = tl.load(tiles + 4 * tile + 1)
    first_position = tl.load(tiles + 4 * tile + 2)
    table = block_tables + tl.load(tiles + 4 * tile + 3).to(tl.int64) * table_stride
    if size == 0:
        return
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    # A token's heads are neighbours.
    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    inside = (rows < size * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    first_place = (first_row.to(tl.int64) * NUM_HEADS + kv_head * GROUP) * HEAD_DIM
    places = (rows // GROUP * (NUM_HEADS * HEAD_DIM) + rows % GROUP * HEAD_DIM)[:, None] + dims[None, :]
    # As in decode_attention: fp8 becomes float16.
    KIND: tl.constexpr = tl.float16 if kv.dtype == tl.float8e4nv else kv.dtype
    PRECISION: tl.constexpr = "ieee" if KIND == tl.float32 else "tf32"
    q = tl.load(queries + first_place + places, inside, other=0.0).to(KIND)
    positions = first_position + rows // GROUP
    end = first_position + size
    keys = kv_head * BLOCK_SIZE
    values = (NUM_KV_HEADS + kv_head) * BLOCK_SIZE

    begin = 0
    # Every query of the tile sees the keys before this one, each of them.
    all_seen = (first_position + 1) // TILE_KEYS * TILE_KEYS
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS
        all_seen = begin
    last = (end - 1) // TILE_KEYS * TILE_KEYS
    second = tl.minimum(begin + TILE_KEYS, last)
    last_block = _block(table, last, BLOCK_SIZE)
    values_block = _block(table, begin, BLOCK_SIZE)
    second_block = _block(table, second, BLOCK_SIZE)
    keys_block = _block(table, tl.minimum(begin + 2 * TILE_KEYS, last), BLOCK_SIZE)

    # A sum for each of a tile's keys spares one over threads a turn. With fp8 no registers are left for them.
    SUMS: tl.constexpr = 1 if kv.dtype == tl.float8e4nv else TILE_KEYS
    best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    totals = tl.zeros([TILE_ROWS, SUMS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, BLOCK_DIM], tl.float32)
    # In front of each turn: a tile's weights, and the scores of the next one on their way.
    k = _tile(kv, values_block, keys + begin % BLOCK_SIZE, KIND)
    next_k = _tile(kv, second_block, keys + second % BLOCK_SIZE, KIND)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weights, _, best, totals = _weigh(scores, positions - begin, best, totals, True, WINDOW)
    scores = tl.dot(q, tl.trans(next_k), input_precision=PRECISION)
    masked_from = tl.maximum(all_seen - TILE_KEYS, begin)
    for position in range(begin, masked_from, TILE_KEYS):
        scores, weights, best, totals, mixed, values_block, keys_block = _turn(
            q, kv, table, keys, values, position, last, positions, scale,
            scores, weights, best, totals, mixed, values_block, keys_block,
            False, WINDOW, BLOCK_SIZE, PRECISION,
        )  # fmt: skip
    for position in range(masked_from, last, TILE_KEYS):
        scores, weights, best, totals, mixed, values_block, keys_block = _turn(
            q, kv, table, keys, values, position, last, positions, scale,
            scores, weights, best, totals, mixed, values_block, keys_block,
            True, WINDOW, BLOCK_SIZE, PRECISION,
        )  # fmt: skip
    v = _tile(kv, last_block, values + last % BLOCK_SIZE, KIND)
    # What lies behind the tile may be no number, which no weight of 0 takes away.
    v = tl.where((last + tl.arange(0, TILE_KEYS) < end)[:, None], v, 0.0)
    mixed = tl.dot(weights.to(KIND), v, mixed, input_precision=PRECISION)
    total = tl.sum(totals, axis=1)
    # Rows behind the tile's last query may have seen nothing.
    mixed = mixed * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out + first_place + places, mixed.to(out.dtype.element_ty), inside)


@triton.jit
def _turn(
    q, kv, table, keys, values, position, last, positions, scale,
    scores, weights, best, totals, mixed, values_block, keys_block,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the values of `position`, have the scores two tiles on made, and meanwhile weigh those between."""
    TILE_KEYS: tl.constexpr = kv.block_shape[1]
    v = _tile(kv, values_block, values + position % BLOCK_SIZE, q.dtype)
    k = _tile(kv, keys_block, keys + tl.minimum(position + 2 * TILE_KEYS, last) % BLOCK_SIZE, q.dtype)
    mixed = tl.dot(weights.to(q.dtype), v, mixed, input_precision=PRECISION)
    # Read for the last time in front of the product that takes the scores' place while they are weighed.
    scaled = scores * scale
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    to_key = positions - (position + TILE_KEYS)
    weights, shrink, best, totals = _weigh(scaled, to_key, best, totals, MASKED, WINDOW)
    mixed = mixed * shrink[:, None]
    # A turn ahead: a copy cannot begin before its block is known.
    values_block = _block(table, position + TILE_KEYS, BLOCK_SIZE)
    keys_block = _block(table, tl.minimum(position + 3 * TILE_KEYS, last), BLOCK_SIZE)
    return scores, weights, best, totals, mixed, values_block, keys_block


@triton.jit
def _block(table, position, BLOCK_SIZE: tl.constexpr):
    return tl.load(table + position // BLOCK_SIZE)


@triton.jit
def _tile(kv, block, place, KIND: tl.constexpr):
    return tl.reshape(kv.load([block, place, 0]), kv.block_shape[1:]).to(KIND)


@triton.jit
def _weigh(scores, last_seen, best, totals, MASKED: tl.constexpr, WINDOW: tl.constexpr):
    """Return a tile's weights, by what the sums so far shrink, and the rows' best scores and totals with the tile.

    `last_seen`: of each row, which of the tile's keys is the last one it sees; used only if MASKED.
    """
    if MASKED:
        key = tl.arange(0, scores.shape[1])[None, :]
        is_seen = key <= last_seen[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (key > last_seen[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    base = new_best
    if WINDOW > 0:
        # A row may have seen nothing yet: no difference of infinities.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    part = weights if totals.shape[1] > 1 else tl.sum(weights, axis=1, keep_dims=True)
    return weights, shrink, new_best, tl.fma(totals, shrink[:, None], part)
