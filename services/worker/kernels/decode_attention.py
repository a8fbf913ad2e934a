"""Attention of one token a sequence over the paged cache, split over the context (Flash-Decoding, Dao et al., 2023).

The contexts of a batch are cut into pieces of about one length by `cut_contexts`, so that a launch of a fixed size
takes any mix of lengths; of a context's pieces the one that is done last merges them all. The query heads that share a
key head are the rows of one product, so that a context is read once for them all. Bound by bytes: the contexts'.

fp8 is read as pairs of neighbouring dimensions, 16 bits each: what has 16 bits comes from shared memory in the tensor
cores' order at once, where single bytes are gathered one by one. A product over dimensions is that over the first ones
of all pairs and that over the second ones.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.shared_attention import MOST_MEMBERS, SharedResults

_LEAST_ROWS = 16
"""Of an operand of the tensor cores."""
_LOG2_E = math.log2(math.e)

PIECE_COLUMNS = 4
"""Of a piece: the sequence's row, its first and its end position, and the context's length. Row -1: there is none."""
SPLIT_COLUMNS = 4
"""Of a row: its first piece and how many pieces it has; of the prefix that it shares, if it shares one, the slot of its
first result and how many it has (`shared_attention`), each MOST_MEMBERS slots behind the one before."""


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """What a launch is told of its sequences; all int32."""

    pieces: Tensor
    """[num_pieces, PIECE_COLUMNS]"""
    splits: Tensor
    """[num_rows, SPLIT_COLUMNS]"""
    block_tables: Tensor
    """[num_rows, blocks of the longest context]"""


@dataclass(frozen=True, slots=True)
class PieceResults:
    """Room for what pieces have for the merge."""

    sums: Tensor
    """[num_pieces, num_heads, head_dim] float32, weighted by the softmax of the piece"""
    log_weights: Tensor
    """[num_pieces, num_heads] float32: log2 of the sum of the exponentials"""
    num_done: Tensor
    """[num_rows, num_kv_heads] int32: zeros, before a launch and after it"""


def piece_results(
    num_pieces: int, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> PieceResults:
    """Make room for the launches of up to so many pieces and rows."""
    return PieceResults(
        torch.zeros((num_pieces, num_heads, head_dim), dtype=torch.float32, device=device),
        torch.zeros((num_pieces, num_heads), dtype=torch.float32, device=device),
        torch.zeros((num_rows, num_kv_heads), dtype=torch.int32, device=device),
    )


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How contexts are cut and the kernel is compiled; any choice is right."""

    tile_tokens: int
    """Keys that are multiplied at once; at most a block."""
    num_warps: int
    num_stages: int
    """Twice the tiles in flight, and one: a tile's block is looked up a stage before it."""
    more_pieces: int = 0
    """Than rows: how finely contexts are cut."""


INVARIANT_TUNING = DecodeTuning(64, 4, 5)
"""For any number of rows, where the order of additions must not depend on it."""
INVARIANT_PIECE_TOKENS = 1024
"""Length of pieces, there."""
_TUNINGS = {
    1: DecodeTuning(64, 2, 7, more_pieces=32),
    8: DecodeTuning(64, 4, 3, more_pieces=48),
    28: DecodeTuning(64, 4, 3, more_pieces=32),
    48: DecodeTuning(64, 4, 3, more_pieces=24),
    65: DecodeTuning(64, 4, 5, more_pieces=24),
    97: DecodeTuning(64, 4, 3, more_pieces=24),
}
_TUNINGS_FP8 = {
    1: DecodeTuning(64, 4, 5, more_pieces=48),
    48: DecodeTuning(64, 4, 5, more_pieces=24),
    128: DecodeTuning(64, 2, 5, more_pieces=24),
    225: DecodeTuning(32, 2, 5, more_pieces=24),
}
"""From so many rows on, by `python -m services.worker.benchmark.tune`: within 3 % of the best in the mean. How
the kernel is compiled changes only where products do (`StepShapes.forms`)."""


def tuning_for(num_rows: int, is_fp8: bool) -> DecodeTuning:
    """Return how the kernel is fast for so many rows of any lengths."""
    tunings = _TUNINGS_FP8 if is_fp8 else _TUNINGS
    return tunings[max(first for first in tunings if first <= num_rows)]


@cache
def num_pieces_for(num_rows: int, is_fp8: bool) -> int:
    """Return into how many pieces the contexts of so many rows are cut at most: of more rows, never into fewer.

    So many more than rows, so that a context much longer than the others is not the last one alone.
    """
    if num_rows == 0:
        return 0
    tunings = _TUNINGS_FP8 if is_fp8 else _TUNINGS
    before = [last for last in (first - 1 for first in tunings) if 0 < last < num_rows]
    return max(rows + tuning_for(rows, is_fp8).more_pieces for rows in (*before, num_rows))


def even_length(own_tokens: NDArray[np.int32], most_pieces: int, granule_tokens: int, least_tokens: int) -> int:
    """Return how long pieces are so that they are at most `most_pieces`, which must not be less than the contexts.

    A multiple of `granule_tokens`, at least `least_tokens`.
    """
    length = max(least_tokens, -(-int(own_tokens.sum()) // most_pieces))
    length = -(-length // granule_tokens) * granule_tokens
    while (-(-own_tokens // length)).sum() > most_pieces:
        # Rounding up costs at most a piece a context: so this ends within a few turns.
        length = -(-(length * 9 // 8) // granule_tokens) * granule_tokens
        length = max(length, least_tokens) + granule_tokens
    return length


def cut_contexts(
    first_tokens: NDArray[np.int32], context_tokens: NDArray[np.int32], length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut contexts, from `first_tokens` on, into pieces of `length` tokens, but for each one's last.

    Returns pieces as in DecodeBatch, but with none filled up, and each context's first piece and number of pieces. The
    longest contexts come first: programs begin in this order, and what the last ones have to do is to be short (Graham,
    1969, longest processing time first).
    """
    own_tokens = context_tokens - first_tokens
    counts = -(-own_tokens // length)
    order = np.argsort(-own_tokens, kind="stable")
    first_piece = np.empty_like(counts)
    first_piece[order] = np.cumsum(counts[order]) - counts[order]
    rows = np.repeat(order.astype(np.int32), counts[order])
    begins = first_tokens[rows] + (np.arange(len(rows)) - first_piece[rows]) * length
    contexts = context_tokens[rows]
    pieces = np.stack((rows, begins, np.minimum(begins + length, contexts), contexts), axis=1)
    return pieces.astype(np.int32), np.stack((first_piece, counts), axis=1).astype(np.int32)


def decode_attention_reference(
    queries: Tensor, layer: PagedLayer, context_tokens: Tensor, block_tables: Tensor, window: int | None
) -> Tensor:
    """Return [num_rows, num_heads, head_dim]: row i attends to its first `context_tokens[i]` tokens, of which a window
    leaves the last."""
    out = torch.zeros_like(queries)
    group = queries.shape[1] // layer.kv.shape[2]
    for row, num_tokens in enumerate(context_tokens.tolist()):
        if num_tokens == 0:
            continue
        keys, values = layer.context(block_tables[row], num_tokens)
        first = max(0, num_tokens - window) if window else 0
        keys, values = (x[first:].repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("hd,thd->ht", queries[row].float(), keys) / math.sqrt(queries.shape[2])
        out[row] = torch.einsum("ht,thd->hd", scores.softmax(dim=1), values).to(out.dtype)
    return out


def decode_attention(
    queries: Tensor,
    layer: PagedLayer,
    batch: DecodeBatch,
    room: PieceResults,
    out: Tensor,
    window: int | None = None,
    *,
    shared: SharedResults | None = None,
    pdl: bool = False,
    tuning: DecodeTuning | None = None,
) -> None:
    """As the reference, into `out`, [num_rows, num_heads, head_dim]; a row without pieces is left as it is.

    `shared`: what rows have of prefixes, which their pieces begin behind. None: no row has any.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = layer.kv.shape[2]
    num_pieces = len(batch.pieces)
    assert queries.is_contiguous()
    assert out.is_contiguous()
    assert len(room.sums) >= num_pieces
    group = num_heads // num_kv_heads
    tuning = tuning or tuning_for(num_rows, layer.is_fp8)
    tile = min(tuning.tile_tokens, layer.block_size_tokens)
    assert tile >= _LEAST_ROWS, "the tensor cores take no block of fewer tokens"
    # A pair of fp8 is one number of 16 bits, and the tensor cores want 16 of those.
    kv = layer.kv.view(torch.int16) if layer.is_fp8 else layer.kv
    block_dim = max((2 if layer.is_fp8 else 1) * _LEAST_ROWS, triton.next_power_of_2(head_dim))
    _decode_attention[(num_kv_heads, num_pieces)](
        queries,
        kv,
        batch.pieces,
        batch.splits,
        batch.block_tables,
        out,
        room.sums,
        room.log_weights,
        room.num_done,
        shared.sums if shared else None,
        shared.log_weights if shared else None,
        batch.block_tables.stride(0),
        kv.stride(0),
        _LOG2_E / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        GROUP=group,
        BLOCK_GROUP=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        MERGED_GROUP=triton.next_power_of_2(group),
        BLOCK_SIZE=layer.block_size_tokens,
        TILE=tile,
        WINDOW=window or 0,
        MOST_MEMBERS=MOST_MEMBERS,
        PAIRS=layer.is_fp8,
        IN_PTX=kv.is_cuda,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


@triton.jit
def _decode_attention(
    queries,
    kv,
    pieces,
    splits,
    block_tables,
    out,
    sums,
    log_weights,
    num_done,
    shared_sums,
    shared_log_weights,
    table_stride,
    kv_block_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    MERGED_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MOST_MEMBERS: tl.constexpr,
    PAIRS: tl.constexpr,
    IN_PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (key head, piece). PAIRS: `kv` is of int16, two fp8 each."""
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    # What a step is told is there before its first kernel begins.
    row = tl.load(pieces + 4 * piece)
    begin = tl.load(pieces + 4 * piece + 1)
    end = tl.load(pieces + 4 * piece + 2)
    context = tl.load(pieces + 4 * piece + 3)
    split = splits + 4 * tl.maximum(row, 0)
    first_part = tl.load(split)
    num_splits = tl.load(split + 1)
    first_shared = tl.load(split + 2)
    num_shared = tl.load(split + 3)
    after_previous(PDL)
    # An empty one must not count as done.
    if (row < 0) | (begin >= end):
        return
    group = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    tokens = tl.arange(0, TILE)
    inside = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + group
    places = (row.to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    # fp8 keys become float16, which is as fast as they are read; bfloat16 is not.
    KIND: tl.constexpr = tl.float16 if PAIRS else kv.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if KIND == tl.float32 else "tf32"
    PACKED: tl.constexpr = 2 if PAIRS else 1
    q = tl.load(queries + places, inside, other=0.0).to(KIND)
    if PAIRS:
        q, q_second = tl.split(tl.reshape(q, (BLOCK_GROUP, BLOCK_DIM // 2, 2)))
    table = block_tables + row.to(tl.int64) * table_stride
    # A block's keys of this head, then its values.
    WIDTH: tl.constexpr = HEAD_DIM // PACKED
    head_kv = kv + kv_head * BLOCK_SIZE * WIDTH
    columns = tl.arange(0, BLOCK_DIM // PACKED)
    in_width = (columns < WIDTH)[None, :]
    within = tokens[:, None] * WIDTH + columns[None, :]
    VALUES: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * WIDTH

    best = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM // PACKED], tl.float32)
    mixed_second = mixed
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(context - WINDOW, 0)
        begin = tl.maximum(begin, first_seen // TILE * TILE)
    for position in range(begin, end, TILE):
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        place = head_kv + block * kv_block_stride + (position % BLOCK_SIZE) * WIDTH
        is_seen = position + tokens < end
        if WINDOW > 0:
            is_seen = is_seen & (position + tokens >= first_seen)
        read = is_seen[:, None] & in_width
        k = tl.load(place + within, read, other=0)
        v = tl.load(place + VALUES + within, read, other=0)
        if PAIRS:
            scores = tl.dot(q, tl.trans(_unpacked(k, False, IN_PTX)))
            scores = tl.dot(q_second, tl.trans(_unpacked(k, True, IN_PTX)), scores) * scale
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # Nothing seen yet, as in a window that begins later: no difference of infinities.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if PAIRS:
            mixed = tl.dot(weights.to(KIND), _unpacked(v, False, IN_PTX), mixed * shrink[:, None])
            mixed_second = tl.dot(weights.to(KIND), _unpacked(v, True, IN_PTX), mixed_second * shrink[:, None])
        else:
            mixed = tl.dot(weights.to(KIND), v, mixed * shrink[:, None], input_precision=PRECISION)
        best = new_best
    if PAIRS:
        mixed = tl.reshape(tl.join(mixed, mixed_second), (BLOCK_GROUP, BLOCK_DIM))

    if num_splits > 1:
        part = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(sums + (piece * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :], part, inside)
        weight = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(log_weights + piece * NUM_HEADS + heads, weight, group < GROUP)
        # All of the program's threads have stored before one of them says so, to the whole device.
        tl.debug_barrier()
        counter = num_done + row * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
            tl.store(counter, 0)
            _merge(
                out, row, kv_head, sums, log_weights, first_part, num_splits, shared_sums, shared_log_weights,
                first_shared, num_shared, NUM_HEADS, HEAD_DIM, BLOCK_DIM, GROUP, MERGED_GROUP, MOST_MEMBERS,
            )  # fmt: skip
    else:
        _finish(
            out, row, heads, group < GROUP, best, total, mixed, shared_sums, shared_log_weights, first_shared,
            num_shared, NUM_HEADS, HEAD_DIM, BLOCK_DIM, MOST_MEMBERS,
        )  # fmt: skip


@triton.jit
def _unpacked(pairs, SECOND: tl.constexpr, IN_PTX: tl.constexpr):
    """The first or the second ones of pairs of fp8, as float16."""
    if IN_PTX:
        BYTES: tl.constexpr = "0x0031" if SECOND else "0x0020"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; .reg .b16 low, high; prmt.b32 both, $1, 0, " + BYTES + "; mov.b32 {low, high}, both; "
            "cvt.rn.f16x2.e4m3x2 $0, low; }",
            "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return ((pairs >> (8 if SECOND else 0)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _merge(
    out, row, kv_head, sums, log_weights, first_part, num_splits, shared_sums, shared_log_weights, first_shared,
    num_shared, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP: tl.constexpr,
    MERGED_GROUP: tl.constexpr, MOST_MEMBERS: tl.constexpr,
):  # fmt: skip
    """Store what all pieces of a context have together. No product wants more rows than there are heads here."""
    group = tl.arange(0, MERGED_GROUP)
    heads = kv_head * GROUP + group
    best = tl.full([MERGED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([MERGED_GROUP], tl.float32)
    mixed = tl.zeros([MERGED_GROUP, BLOCK_DIM], tl.float32)
    best, total, mixed = _with_parts(
        sums, log_weights, first_part, num_splits, 1, heads, group < GROUP, best, total, mixed,
        NUM_HEADS, HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    _finish(
        out, row, heads, group < GROUP, best, total, mixed, shared_sums, shared_log_weights, first_shared, num_shared,
        NUM_HEADS, HEAD_DIM, BLOCK_DIM, MOST_MEMBERS,
    )  # fmt: skip


@triton.jit
def _finish(
    out, row, heads, in_group, best, total, mixed, shared_sums, shared_log_weights, first_shared, num_shared,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MOST_MEMBERS: tl.constexpr,
):  # fmt: skip
    """Add what a row has of a prefix that it shares, if it shares one, and store its result."""
    if shared_sums is not None:
        best, total, mixed = _with_parts(
            shared_sums, shared_log_weights, first_shared, num_shared, MOST_MEMBERS, heads, in_group, best, total,
            mixed, NUM_HEADS, HEAD_DIM, BLOCK_DIM,
        )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    dims = tl.arange(0, BLOCK_DIM)
    places = (row.to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + places, mixed.to(out.dtype.element_ty), in_group[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _with_parts(
    sums, log_weights, first, count, step, heads, in_group, best, total, mixed,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Add parts from `first` on, each weighted by its share of the exponentials; four are on their way at once."""
    for index in range(0, count, 4):
        weight0, part0 = _part(
            sums, log_weights, first, index, count, step, heads, in_group, NUM_HEADS, HEAD_DIM, BLOCK_DIM
        )
        weight1, part1 = _part(
            sums, log_weights, first, index + 1, count, step, heads, in_group, NUM_HEADS, HEAD_DIM, BLOCK_DIM
        )
        weight2, part2 = _part(
            sums, log_weights, first, index + 2, count, step, heads, in_group, NUM_HEADS, HEAD_DIM, BLOCK_DIM
        )
        weight3, part3 = _part(
            sums, log_weights, first, index + 3, count, step, heads, in_group, NUM_HEADS, HEAD_DIM, BLOCK_DIM
        )
        new_best = tl.maximum(tl.maximum(tl.maximum(weight0, weight1), tl.maximum(weight2, weight3)), best)
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        shrink = tl.exp2(best - base)
        weight0 = tl.exp2(weight0 - base)
        weight1 = tl.exp2(weight1 - base)
        weight2 = tl.exp2(weight2 - base)
        weight3 = tl.exp2(weight3 - base)
        total = total * shrink + (weight0 + weight1) + (weight2 + weight3)
        mixed = mixed * shrink[:, None] + part0 * weight0[:, None] + part1 * weight1[:, None]
        mixed += part2 * weight2[:, None] + part3 * weight3[:, None]
        best = new_best
    return best, total, mixed


@triton.jit
def _part(
    sums, log_weights, first, index, count, step, heads, in_group,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Load a part, or one that weighs nothing."""
    dims = tl.arange(0, BLOCK_DIM)
    # Compared head by head: the interpreter takes no mask that a scalar was spread over.
    is_there = in_group & (heads * 0 + index < count)
    place = (first + index * step) * NUM_HEADS + heads
    # Past the first-level cache, which other processors' stores do not reach.
    log_weight = tl.load(log_weights + place, is_there, other=float("-inf"), cache_modifier=".cg")
    inside = is_there[:, None] & (dims < HEAD_DIM)[None, :]
    return log_weight, tl.load(
        sums + place[:, None] * HEAD_DIM + dims[None, :], inside, other=0.0, cache_modifier=".cg"
    )
