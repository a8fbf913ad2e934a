"""Rotary embedding (Su et al., 2021) of queries and keys, and the write of keys and values into the paged cache.

One pass over a fused product of queries, keys and values, or over its parts, with what some families add: a bias, a
norm of each head.
Bound by bytes; at few rows by the launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.rows import FP8_MAX, Scaled


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """What is done to heads before they are turned, and the turns."""

    turns: Tensor
    """Cosine and sine of each position's angles, for pairs of neighbouring dimensions: [positions, head_dim / 2, 2],
    float32."""
    bias: Tensor | None = None
    """[(num_heads + 2 * num_kv_heads) * head_dim] float32"""
    qk_norm: Tensor | None = None
    """[num_heads + num_kv_heads, head_dim] float32, a row a head"""
    epsilon: float = 0.0


def rope_and_write_reference(
    qkv: Scaled, weights: HeadWeights, positions: Tensor, slots: Tensor, layer: PagedLayer
) -> Tensor:
    """Write keys and values into `layer`; return the turned queries, [num_tokens, num_heads, head_dim], in the type of
    the product.

    A token's slot is block * block_size_tokens + its place in the block; below 0: it is not written.
    """
    num_kv_heads, block_size, head_dim = layer.kv.shape[2:]
    heads = qkv.dequantized()
    if weights.bias is not None:
        heads = heads + weights.bias
    heads = heads.view(len(positions), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turned, values = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if weights.qk_norm is not None:
        turned = turned * torch.rsqrt((turned * turned).mean(dim=2, keepdim=True) + weights.epsilon) * weights.qk_norm
    cosine, sine = weights.turns[positions.long()][:, None].unbind(dim=3)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=3).flatten(2)
    written = slots >= 0
    blocks, places = slots[written].long() // block_size, slots[written].long() % block_size
    limit = FP8_MAX if layer.is_fp8 else float("inf")
    layer.kv[blocks, 0, :, places] = turned[written, num_heads:].clamp(-limit, limit).to(layer.kv.dtype)
    layer.kv[blocks, 1, :, places] = values[written].clamp(-limit, limit).to(layer.kv.dtype)
    return turned[:, :num_heads].to(qkv.product.dtype)


def rope_and_write(
    qkv: Scaled,
    weights: HeadWeights,
    positions: Tensor,
    slots: Tensor,
    layer: PagedLayer,
    queries: Tensor,
    *,
    keeps_dense: bool = False,
    pdl: bool = False,
) -> None:
    """As the reference; the queries go into `queries`, [num_tokens, num_heads, head_dim].

    `keeps_dense`: the product's keys and values are overwritten by what goes into the cache, in the product's type. It
    must be whole then.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = layer.kv.shape[2]
    assert qkv.product.shape[-2:] == (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    assert qkv.product.ndim == 2 or not keeps_dense
    assert qkv.product.is_contiguous()
    assert queries.is_contiguous()
    _rope_and_write[(num_tokens, num_kv_heads)](
        qkv.product,
        qkv.row_scales,
        qkv.channel_scales,
        weights.bias,
        weights.qk_norm,
        weights.turns,
        positions,
        slots,
        queries,
        layer.kv,
        num_tokens,
        weights.epsilon,
        layer.kv.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GROUP=num_heads // num_kv_heads,
        BLOCK_GROUP=triton.next_power_of_2(num_heads // num_kv_heads),
        BLOCK_PAIRS=triton.next_power_of_2(head_dim) // 2,
        BLOCK_SIZE=layer.block_size_tokens,
        FP8_LIMIT=FP8_MAX if layer.is_fp8 else 0.0,
        PARTS=qkv.num_parts,
        KEEPS_DENSE=keeps_dense,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=1,
    )


@triton.jit
def _heads(
    qkv,
    bias,
    row_scale,
    channel_scales,
    row,
    num_rows,
    first_head,
    heads,
    is_head,
    NUM_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Load heads from `first_head` on, as pairs of neighbours: two of [heads, BLOCK_PAIRS] float32."""
    dims = tl.arange(0, 2 * BLOCK_PAIRS)
    columns = (first_head + heads)[:, None] * HEAD_DIM + dims[None, :]
    inside = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(qkv + row * NUM_COLUMNS + columns, inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(qkv + (part * num_rows + row) * NUM_COLUMNS + columns, inside, other=0.0)
    if channel_scales is not None:
        x = x * row_scale * tl.load(channel_scales + columns, inside, other=0.0)
    if bias is not None:
        x += tl.load(bias + columns, inside, other=0.0)
    return tl.split(tl.reshape(x, (x.shape[0], BLOCK_PAIRS, 2)))


@triton.jit
def _normed(even, odd, qk_norm, first_head, heads, is_head, epsilon, HEAD_DIM, BLOCK_PAIRS):
    if qk_norm is not None:
        pairs = tl.arange(0, BLOCK_PAIRS)
        inside = is_head[:, None] & (pairs < HEAD_DIM // 2)[None, :]
        places = qk_norm + (first_head + heads)[:, None] * HEAD_DIM + 2 * pairs[None, :]
        factor = tl.rsqrt(tl.sum(even * even + odd * odd, axis=1) / HEAD_DIM + epsilon)[:, None]
        even = even * factor * tl.load(places, inside, other=0.0)
        odd = odd * factor * tl.load(places + 1, inside, other=0.0)
    return even, odd


@triton.jit
def _rounded(even, odd, out, FP8_LIMIT: tl.constexpr):
    x = tl.join(even, odd)
    x = tl.reshape(x, (x.shape[0], x.shape[1] * 2))
    if FP8_LIMIT > 0:
        x = tl.minimum(tl.maximum(x, -FP8_LIMIT), FP8_LIMIT)
    return x.to(out.dtype.element_ty)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_and_write(
    qkv,
    row_scales,
    channel_scales,
    bias,
    qk_norm,
    turns,
    positions,
    slots,
    queries,
    kv,
    num_rows,
    epsilon,
    kv_block_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    PARTS: tl.constexpr,
    KEEPS_DENSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, key head): the queries that share the head, its key and its value."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    columns: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    dims = tl.arange(0, 2 * BLOCK_PAIRS)
    in_head = (dims < HEAD_DIM)[None, :]
    group = tl.arange(0, BLOCK_GROUP)
    in_group = group < GROUP
    one = tl.arange(0, 1)
    # What a step is told is there before its first kernel begins.
    pairs2 = tl.load(turns + tl.load(positions + row).to(tl.int64) * HEAD_DIM + dims, dims < HEAD_DIM, other=0.0)
    cosine, sine = tl.split(tl.reshape(pairs2, (1, BLOCK_PAIRS, 2)))
    slot = tl.load(slots + row)
    after_previous(PDL)
    row_scale = 1.0
    if channel_scales is not None:
        row_scale = tl.load(row_scales + row)

    first = kv_head * GROUP
    even, odd = _heads(
        qkv, bias, row_scale, channel_scales, row, num_rows, first, group, in_group, columns, HEAD_DIM, BLOCK_PAIRS,
        PARTS,
    )  # fmt: skip
    even, odd = _normed(even, odd, qk_norm, first, group, in_group, epsilon, HEAD_DIM, BLOCK_PAIRS)
    x = _rounded(even * cosine - odd * sine, odd * cosine + even * sine, queries, 0.0)
    places = (row * NUM_HEADS + first + group)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(queries + places, x, in_group[:, None] & in_head)

    if slot >= 0:
        block = (slot // BLOCK_SIZE).to(tl.int64)
        place = kv + block * kv_block_stride + (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
        key = NUM_HEADS + kv_head
        key_even, key_odd = _heads(
            qkv, bias, row_scale, channel_scales, row, num_rows, key, one, one == 0, columns, HEAD_DIM, BLOCK_PAIRS,
            PARTS,
        )  # fmt: skip
        key_even, key_odd = _normed(key_even, key_odd, qk_norm, key, one, one == 0, epsilon, HEAD_DIM, BLOCK_PAIRS)
        k = _rounded(key_even * cosine - key_odd * sine, key_odd * cosine + key_even * sine, kv, FP8_LIMIT)
        tl.store(place + dims[None, :], k, in_head)
        if KEEPS_DENSE:
            dense_k = _rounded(key_even * cosine - key_odd * sine, key_odd * cosine + key_even * sine, qkv, 0.0)
            tl.store(qkv + row * columns + key * HEAD_DIM + dims[None, :], dense_k, in_head)
        value = NUM_HEADS + NUM_KV_HEADS + kv_head
        value_even, value_odd = _heads(
            qkv, bias, row_scale, channel_scales, row, num_rows, value, one, one == 0, columns, HEAD_DIM, BLOCK_PAIRS,
            PARTS,
        )  # fmt: skip
        v = _rounded(value_even, value_odd, kv, FP8_LIMIT)
        tl.store(place + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM + dims[None, :], v, in_head)
        if KEEPS_DENSE:
            dense_v = _rounded(value_even, value_odd, qkv, 0.0)
            tl.store(qkv + row * columns + value * HEAD_DIM + dims[None, :], dense_v, in_head)
