"""A step of attention by tiles, for kernels whose rows see many keys (online softmax: Milakov and Gimelshein, 2018)."""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, place, position, end, query_positions, best, total, mixed, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUES: tl.constexpr, TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to a tile of a block's keys: return the rows' best scores, totals and sums with it.

    `place`: where the keys begin; values lie VALUES behind. Only if MASKED are keys from `end` on, behind a query, and
    outside of its window left out.
    """
    tokens = tl.arange(0, TILE_KEYS)
    dims = tl.arange(0, BLOCK_DIM)
    within = tokens[:, None] * HEAD_DIM + dims[None, :]
    if MASKED:
        read = (position + tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(place + within, read, other=0.0).to(q.dtype)
        v = tl.load(place + VALUES + within, read, other=0.0).to(q.dtype)
    elif HEAD_DIM == BLOCK_DIM:
        k = tl.load(place + within).to(q.dtype)
        v = tl.load(place + VALUES + within).to(q.dtype)
    else:
        k = tl.load(place + within, (dims < HEAD_DIM)[None, :], other=0.0).to(q.dtype)
        v = tl.load(place + VALUES + within, (dims < HEAD_DIM)[None, :], other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        behind = query_positions[:, None] - (position + tokens)[None, :]
        is_seen = behind >= 0
        if WINDOW > 0:
            is_seen = is_seen & (behind < WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    base = new_best
    if MASKED:
        # A row may have seen nothing yet: no difference of infinities.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(weights, axis=1)
    mixed = tl.dot(weights.to(q.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    return new_best, total, mixed
