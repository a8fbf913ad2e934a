"""Attention of several sequences' tokens to a prefix that they share: read once for all of them (cascade attention).

As in Hydragen (Juravsky et al., 2024) and FlashInfer (Ye et al., 2025): the queries of up to MOST_MEMBERS sequences are
the rows of one product with the prefix's keys, so that what was bound by bytes is bound by flops. What comes out is
merged by `decode_attention`, which attends to the rest of each context.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.paged_kv import PagedLayer

MOST_MEMBERS = 16
"""Sequences of a piece; the results of member i of piece p have slot p * MOST_MEMBERS + i."""
SHARED_COLUMNS = 4 + MOST_MEMBERS
"""Of a piece: its number of members, its first and its end position, nothing, and the members' rows. 0 members: it is
none."""
_LEAST_ROWS = 16
_TILE_ROWS = 64
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class SharedResults:
    """What pieces of prefixes have for the merge, a slot for each of their members."""

    sums: Tensor
    """[num_slots, num_heads, head_dim] float32, weighted by the softmax of the piece"""
    log_weights: Tensor
    """[num_slots, num_heads] float32: log2 of the sum of the exponentials"""


def shared_results(num_pieces: int, num_heads: int, head_dim: int, device: torch.device) -> SharedResults:
    """Make room for the launches of up to so many pieces."""
    slots = num_pieces * MOST_MEMBERS
    return SharedResults(
        torch.zeros((slots, num_heads, head_dim), dtype=torch.float32, device=device),
        torch.zeros((slots, num_heads), dtype=torch.float32, device=device),
    )


def members_of_piece(num_heads: int, num_kv_heads: int) -> int:
    """Return how many sequences' queries fill the rows of a product."""
    block_group = 1 << (num_heads // num_kv_heads - 1).bit_length()
    return max(1, min(MOST_MEMBERS, _TILE_ROWS // block_group))


def shared_attention_reference(
    queries: Tensor, layer: PagedLayer, pieces: Tensor, block_tables: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return each slot's sums, [num_heads, head_dim], and log weights, [num_heads]."""
    group = queries.shape[1] // layer.kv.shape[2]
    found = {}
    for piece, (num_members, begin, end, _, *members) in enumerate(pieces.tolist()):
        for index, row in enumerate(members[:num_members]):
            keys, values = layer.context(block_tables[members[0]], end)
            keys, values = (x[begin:].repeat_interleave(group, dim=1) for x in (keys, values))
            scores = torch.einsum("hd,thd->ht", queries[row].float(), keys) / math.sqrt(queries.shape[2])
            sums = torch.einsum("ht,thd->hd", scores.softmax(dim=1), values)
            found[piece * MOST_MEMBERS + index] = sums, scores.logsumexp(dim=1) * _LOG2_E
    return found


def shared_attention(
    queries: Tensor,
    layer: PagedLayer,
    pieces: Tensor,
    block_tables: Tensor,
    room: SharedResults,
    *,
    pdl: bool = False,
) -> None:
    """As the reference, into `room`. queries: [num_rows, num_heads, head_dim]; pieces: [num_pieces, SHARED_COLUMNS],
    int32, of whole blocks. The block table of a piece is that of its first member."""
    _, num_heads, head_dim = queries.shape
    num_kv_heads = layer.kv.shape[2]
    assert queries.is_contiguous()
    assert pieces.shape[1] == SHARED_COLUMNS
    assert len(room.sums) >= len(pieces) * MOST_MEMBERS
    group = num_heads // num_kv_heads
    block_group = triton.next_power_of_2(group)
    # Of one head a sequence the rows are filled up to what the tensor cores take.
    members = members_of_piece(num_heads, num_kv_heads)
    block_rows = max(_LEAST_ROWS, members * block_group)
    tile = min(64, layer.block_size_tokens)
    assert tile >= _LEAST_ROWS, "the tensor cores take no block of fewer tokens"
    _shared_attention[(num_kv_heads, len(pieces))](
        queries,
        layer.kv,
        pieces,
        block_tables,
        room.sums,
        room.log_weights,
        block_tables.stride(0),
        layer.kv.stride(0),
        _LOG2_E / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(_LEAST_ROWS, triton.next_power_of_2(head_dim)),
        GROUP=group,
        BLOCK_GROUP=block_group,
        ROWS=block_rows,
        MOST_MEMBERS=MOST_MEMBERS,
        BLOCK_SIZE=layer.block_size_tokens,
        TILE=tile,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4 if block_rows <= _TILE_ROWS else 8,
        num_stages=3 if queries.dtype.itemsize == 2 else 1,
    )


@triton.jit
def _shared_attention(
    queries,
    kv,
    pieces,
    block_tables,
    sums,
    log_weights,
    table_stride,
    kv_block_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    MOST_MEMBERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (key head, piece)."""
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    after_previous(PDL)
    told = pieces + piece * (4 + MOST_MEMBERS)
    num_members = tl.load(told)
    if num_members == 0:
        return
    begin = tl.load(told + 1)
    end = tl.load(told + 2)
    table = block_tables + tl.load(told + 4).to(tl.int64) * table_stride
    rows = tl.arange(0, ROWS)
    member = rows // BLOCK_GROUP
    is_row = (member < num_members) & (rows % BLOCK_GROUP < GROUP)
    heads = kv_head * GROUP + rows % BLOCK_GROUP
    dims = tl.arange(0, BLOCK_DIM)
    inside = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    # As in decode_attention: fp8 becomes float16.
    KIND: tl.constexpr = tl.float16 if kv.dtype.element_ty == tl.float8e4nv else kv.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if KIND == tl.float32 else "tf32"
    row = tl.load(told + 4 + member, is_row, other=0).to(tl.int64)
    q = tl.load(queries + (row * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :], inside, other=0.0).to(KIND)
    head_kv = kv + kv_head * BLOCK_SIZE * HEAD_DIM
    VALUES: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    # Whole blocks, which all members see: nothing is masked.
    tokens = tl.arange(0, TILE)
    within = tokens[:, None] * HEAD_DIM + dims[None, :]
    for position in range(begin, end, TILE):
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        place = head_kv + block * kv_block_stride + (position % BLOCK_SIZE) * HEAD_DIM
        if HEAD_DIM == BLOCK_DIM:
            k = tl.load(place + within).to(KIND)
            v = tl.load(place + VALUES + within).to(KIND)
        else:
            k = tl.load(place + within, (dims < HEAD_DIM)[None, :], other=0.0).to(KIND)
            v = tl.load(place + VALUES + within, (dims < HEAD_DIM)[None, :], other=0.0).to(KIND)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        # Online softmax: Milakov and Gimelshein, 2018.
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(KIND), v, mixed * shrink[:, None], input_precision=PRECISION)
        best = new_best

    slot = (piece * MOST_MEMBERS + member) * NUM_HEADS + heads
    tl.store(sums + slot[:, None] * HEAD_DIM + dims[None, :], mixed / total[:, None], inside)
    tl.store(log_weights + slot, best + tl.log2(total), is_row)
