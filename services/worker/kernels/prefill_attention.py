"""Causal attention of chunks of several tokens over the paged cache (FlashAttention-2, Dao, 2023).

A chunk's keys and values are in the cache already, behind those of the tokens before it. Its queries are cut into tiles
of neighbouring tokens by `cut_chunks`; one launch takes tiles of any chunks. Bound by flops.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from services.worker.kernels.attend import attend
from services.worker.kernels.launch import after_previous
from services.worker.kernels.paged_kv import PagedLayer

_LOG2_E = math.log2(math.e)
_LEAST_ROWS = 16

TILE_TOKENS = 64
TILE_COLUMNS = 4
"""Of a tile: the row of its first query, number of queries, position of the first, row of its block table."""


def cut_chunks(
    first_rows: NDArray[np.int32], num_tokens: NDArray[np.int32], first_positions: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Cut chunks into tiles, those with the longest contexts first: [num_tiles, TILE_COLUMNS]. Chunk i has row i of the
    block tables."""
    counts = -(-num_tokens // TILE_TOKENS)
    chunks = np.repeat(np.arange(len(num_tokens)), counts)
    begins = (np.arange(len(chunks)) - (np.cumsum(counts) - counts)[chunks]) * TILE_TOKENS
    sizes = np.minimum(TILE_TOKENS, num_tokens[chunks] - begins)
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
    *,
    pdl: bool = False,
    is_batch_invariant: bool = False,
) -> None:
    """As the reference, into `out`; rows of no tile are left as they are. A tile of 0 queries is none.

    `is_batch_invariant`: a row's result is the same to the last bit, wherever its chunk begins.
    """
    _, num_heads, head_dim = queries.shape
    num_kv_heads = layer.kv.shape[2]
    assert queries.is_contiguous()
    assert out.is_contiguous()
    tile_keys = min(64, layer.block_size_tokens)
    assert tile_keys >= _LEAST_ROWS, "the tensor cores take no block of fewer tokens"
    _prefill_attention[(num_heads, len(tiles))](
        queries,
        layer.kv,
        tiles,
        block_tables,
        out,
        block_tables.stride(0),
        layer.kv.stride(0),
        _LOG2_E / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(_LEAST_ROWS, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=layer.block_size_tokens,
        TILE=TILE_TOKENS,
        TILE_KEYS=tile_keys,
        WINDOW=window or 0,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
        num_stages=3 if queries.dtype.itemsize == 2 else 1,
        # Keys that all of a tile's queries see are scaled and compared in one instruction if that may be, others, which
        # are masked between the two, in two: that rounds another time.
        enable_fp_fusion=not is_batch_invariant,
    )


@triton.jit
def _prefill_attention(
    queries,
    kv,
    tiles,
    block_tables,
    out,
    table_stride,
    kv_block_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (head, tile)."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    after_previous(PDL)
    first_row = tl.load(tiles + 4 * tile)
    size = tl.load(tiles + 4 * tile + 1)
    first_position = tl.load(tiles + 4 * tile + 2)
    table = block_tables + tl.load(tiles + 4 * tile + 3).to(tl.int64) * table_stride
    if size == 0:
        return
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_DIM)
    inside = (rows < size)[:, None] & (dims < HEAD_DIM)[None, :]
    places = ((first_row + rows).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    # As in decode_attention: fp8 becomes float16.
    KIND: tl.constexpr = tl.float16 if kv.dtype.element_ty == tl.float8e4nv else kv.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if KIND == tl.float32 else "tf32"
    q = tl.load(queries + places, inside, other=0.0).to(KIND)
    VALUES: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    head_kv = kv + head // (NUM_HEADS // NUM_KV_HEADS) * BLOCK_SIZE * HEAD_DIM
    positions = first_position + rows
    end = first_position + size

    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, BLOCK_DIM], tl.float32)
    begin = 0
    # Every query of the tile sees the keys before this one, each of them.
    all_seen = (first_position + 1) // TILE_KEYS * TILE_KEYS
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS
        all_seen = begin
    for position in range(begin, all_seen, TILE_KEYS):
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        place = head_kv + block * kv_block_stride + (position % BLOCK_SIZE) * HEAD_DIM
        best, total, mixed = attend(
            q, place, position, end, positions, best, total, mixed, scale,
            HEAD_DIM, BLOCK_DIM, VALUES, TILE_KEYS, 0, False, PRECISION,
        )  # fmt: skip
    for position in range(all_seen, end, TILE_KEYS):
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        place = head_kv + block * kv_block_stride + (position % BLOCK_SIZE) * HEAD_DIM
        best, total, mixed = attend(
            q, place, position, end, positions, best, total, mixed, scale,
            HEAD_DIM, BLOCK_DIM, VALUES, TILE_KEYS, WINDOW, True, PRECISION,
        )  # fmt: skip
    # Rows behind the tile's last query may have seen nothing.
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + places, mixed.to(out.dtype.element_ty), inside)
