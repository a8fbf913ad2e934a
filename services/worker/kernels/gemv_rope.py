"""One row times queries', keys' and values' weights, turned and written into the paged cache as they are made.

As `gemv` and `rope_and_write` behind it, and a kernel less: at one row the second one is all launch. A program has two
neighbouring outputs, which are turned together.
"""

import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.gemv import gemv_reference
from services.worker.kernels.launch import after_previous
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.rope_kv import HeadWeights, rope_and_write_reference
from services.worker.kernels.rows import FP8_MAX, Scaled


def gemv_rope_reference(
    row: Tensor,
    weight: Tensor,
    channel_scales: Tensor | None,
    heads: HeadWeights,
    position: Tensor,
    slot: Tensor,
    layer: PagedLayer,
) -> Tensor:
    """row: [1, num_inputs]; weight: [outputs of all heads, num_inputs]; position, slot: [1]. Writes the key and the
    value into `layer`; returns the turned queries, [1, num_heads, head_dim]."""
    product = gemv_reference(row.float(), weight, channel_scales)
    return rope_and_write_reference(Scaled(product), heads, position, slot, layer).to(row.dtype)


def gemv_rope(
    row: Tensor,
    weight: Tensor,
    channel_scales: Tensor | None,
    heads: HeadWeights,
    position: Tensor,
    slot: Tensor,
    layer: PagedLayer,
    queries: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """As the reference; the queries go into `queries`. Heads have no norm: it would need more than two outputs.

    `position` and `slot` must be there before the kernel in front begins, as a step's inputs are.
    """
    num_outputs, num_inputs = weight.shape
    _, num_heads, head_dim = queries.shape
    num_kv_heads = layer.kv.shape[2]
    assert heads.qk_norm is None
    assert row.shape == (1, num_inputs)
    assert num_outputs == (num_heads + 2 * num_kv_heads) * head_dim
    assert weight.is_contiguous()
    assert queries.is_contiguous()
    block = triton.next_power_of_2(num_inputs)
    _gemv_rope[(num_outputs // 2,)](
        row,
        weight,
        channel_scales,
        heads.bias,
        heads.turns,
        position,
        slot,
        queries,
        layer.kv,
        num_inputs,
        layer.kv.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=layer.block_size_tokens,
        FP8_LIMIT=FP8_MAX if layer.is_fp8 else 0.0,
        BLOCK=block,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=2 if block <= 4096 else 4,
    )


@triton.jit
def _gemv_rope(
    row,
    weight,
    channel_scales,
    bias,
    turns,
    position,
    slot,
    queries,
    kv,
    num_inputs,
    kv_block_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    first = 2 * tl.program_id(0)
    head = first // HEAD_DIM
    dim = first % HEAD_DIM
    columns = tl.arange(0, BLOCK)
    inside = columns < num_inputs
    place = weight + first.to(tl.int64) * num_inputs + columns
    first_weights = tl.load(place, inside, other=0.0)
    second_weights = tl.load(place + num_inputs, inside, other=0.0)
    first_scale = 1.0
    second_scale = 1.0
    if channel_scales is not None:
        first_scale = tl.load(channel_scales + first)
        second_scale = tl.load(channel_scales + first + 1)
    turn = turns + tl.load(position).to(tl.int64) * HEAD_DIM + dim
    cosine = tl.load(turn)
    sine = tl.load(turn + 1)
    slot_here = tl.load(slot)
    after_previous(PDL)
    x = tl.load(row + columns, inside, other=0.0).to(tl.float32)
    even = tl.sum(first_weights.to(tl.float32) * x) * first_scale
    odd = tl.sum(second_weights.to(tl.float32) * x) * second_scale
    if bias is not None:
        even += tl.load(bias + first)
        odd += tl.load(bias + first + 1)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    both = tl.arange(0, 2)
    turned = tl.where(both == 0, even * cosine - odd * sine, odd * cosine + even * sine)
    turned = tl.where(is_value, tl.where(both == 0, even, odd), turned)
    if head < NUM_HEADS:
        tl.store(queries + first + both, turned.to(queries.dtype.element_ty))
    elif slot_here >= 0:
        block = (slot_here // BLOCK_SIZE).to(tl.int64)
        # Keys of all heads lie before the values of all.
        written = (head - NUM_HEADS) * BLOCK_SIZE + slot_here % BLOCK_SIZE
        if FP8_LIMIT > 0:
            turned = tl.minimum(tl.maximum(turned, -FP8_LIMIT), FP8_LIMIT)
        tl.store(kv + block * kv_block_stride + written * HEAD_DIM + dim + both, turned.to(kv.dtype.element_ty))
