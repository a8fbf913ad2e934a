"""SwiGLU (Shazeer, 2020): silu(gate) * up, and the rows' rounding to fp8 where that is wanted. Bound by bytes."""

import triton
import triton.language as tl
from torch.nn.functional import silu

from services.worker.kernels.launch import after_previous
from services.worker.kernels.rows import FP8_MAX, Rows, Scaled, round_rows

_BLOCK = 1024
"""Columns of a program, where a row needs no scale."""
_MANY_ROWS = 512
"""From so many on a row's program computes it twice, piece by piece, and leaves room for others beside it: 8,192 rows
of 14,336 took 326 us as one piece each."""
_PIECE = 2048


def swiglu_reference(gate_up: Scaled, to_fp8: bool) -> Rows:
    """gate_up: [num_rows, 2 * size], the gate first. Returns [num_rows, size]."""
    gate, up = gate_up.dequantized().chunk(2, dim=1)
    activated = silu(gate) * up
    return round_rows(activated) if to_fp8 else Rows(activated.to(gate_up.product.dtype))


def swiglu(gate_up: Scaled, out: Rows, *, pdl: bool = False) -> None:
    """As the reference, into `out`, with scales if it has some."""
    num_rows, size = out.values.shape
    assert gate_up.product.shape == (num_rows, 2 * size)
    assert gate_up.product.is_contiguous()
    assert out.values.is_contiguous()
    if out.scales is None:
        block = min(_BLOCK, triton.next_power_of_2(size))
        grid, num_warps = (num_rows, triton.cdiv(size, block)), 4
    else:
        block = triton.next_power_of_2(size)
        grid, num_warps = (num_rows, 1), max(1, min(16, block // 512))
    if out.scales is not None and num_rows >= _MANY_ROWS:
        _swiglu_in_pieces[(num_rows,)](
            gate_up.product,
            gate_up.row_scales,
            gate_up.channel_scales,
            out.values,
            out.scales,
            size,
            BLOCK=min(_PIECE, block),
            FP8_LIMIT=FP8_MAX,
            PDL=pdl,
            launch_pdl=pdl,
            num_warps=4,
        )
        return
    _swiglu[grid](
        gate_up.product,
        gate_up.row_scales,
        gate_up.channel_scales,
        out.values,
        out.scales,
        size,
        BLOCK=block,
        FP8_LIMIT=FP8_MAX,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=num_warps,
    )


@triton.jit
def _scales(channel_scales, columns, inside, size):
    if channel_scales is None:
        return 1.0, 1.0
    gate_scale = tl.load(channel_scales + columns, inside, other=0.0)
    return gate_scale, tl.load(channel_scales + size + columns, inside, other=0.0)


@triton.jit
def _activated(gate_up, row_scales, row, columns, inside, size, gate_scale, up_scale):
    gate = tl.load(gate_up + row * 2 * size + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, inside, other=0.0).to(tl.float32)
    if row_scales is not None:
        row_scale = tl.load(row_scales + row)
        gate = gate * row_scale * gate_scale
        up = up * row_scale * up_scale
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _swiglu(
    gate_up,
    row_scales,
    channel_scales,
    out,
    out_scales,
    size,
    BLOCK: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_scale, up_scale = _scales(channel_scales, columns, inside, size)
    after_previous(PDL)
    activated = _activated(gate_up, row_scales, row, columns, inside, size, gate_scale, up_scale)
    if out_scales is not None:
        largest = tl.maximum(tl.max(tl.abs(activated)), 1e-12)
        tl.store(out_scales + row, largest / FP8_LIMIT)
        activated = tl.minimum(tl.maximum(activated * (FP8_LIMIT / largest), -FP8_LIMIT), FP8_LIMIT)
    tl.store(out + row * size + columns, activated.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_in_pieces(
    gate_up,
    row_scales,
    channel_scales,
    out,
    out_scales,
    size,
    BLOCK: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `_swiglu` with scales, of a row; what it reads the second time is still in the cache."""
    row = tl.program_id(0).to(tl.int64)
    after_previous(PDL)
    largest = 1e-12
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < size
        gate_scale, up_scale = _scales(channel_scales, columns, inside, size)
        activated = _activated(gate_up, row_scales, row, columns, inside, size, gate_scale, up_scale)
        largest = tl.maximum(largest, tl.max(tl.abs(activated)))
    factor = FP8_LIMIT / largest
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < size
        gate_scale, up_scale = _scales(channel_scales, columns, inside, size)
        activated = _activated(gate_up, row_scales, row, columns, inside, size, gate_scale, up_scale)
        activated = tl.minimum(tl.maximum(activated * factor, -FP8_LIMIT), FP8_LIMIT)
        tl.store(out + row * size + columns, activated.to(out.dtype.element_ty), inside)
    # The scales of the product may be the same memory: no thread may still have to read them.
    tl.debug_barrier()
    tl.store(out_scales + row, largest / FP8_LIMIT)
