"""SwiGLU (Shazeer, 2020): silu(gate) * up, and the rows' rounding to fp8 where that is wanted. Bound by bytes."""

import triton
import triton.language as tl
from torch.nn.functional import silu

from services.worker.kernels.launch import after_previous
from services.worker.kernels.round_rows import rounded_row
from services.worker.kernels.rows import FP8_MAX, Rows, Scaled, round_rows

_BLOCK = 1024
"""Columns of a program, where a row needs no scale."""


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
    _swiglu[grid](
        gate_up.product,
        gate_up.row_scales,
        gate_up.channel_scales,
        out.values,
        out.scales,
        size,
        BLOCK=block,
        FP8_LIMIT=FP8_MAX,
        IN_PTX=out.values.is_cuda,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=num_warps,
    )


@triton.jit
def _sigmoid(x, IN_PTX: tl.constexpr):
    """1 / (1 + exp(-x)). In PTX of four instructions: denormals and a division that is right to the last bit cost
    another ten, and at hundreds of rows the kernel is bound by its instructions."""
    if IN_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activated(gate_up, row_scales, row, columns, inside, size, gate_scale, up_scale, IN_PTX: tl.constexpr):
    gate = tl.load(gate_up + row * 2 * size + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, inside, other=0.0).to(tl.float32)
    if row_scales is not None:
        row_scale = tl.load(row_scales + row)
        gate = gate * row_scale * gate_scale
        up = up * row_scale * up_scale
    return gate * _sigmoid(gate, IN_PTX) * up


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
    IN_PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_scale = 1.0
    up_scale = 1.0
    if channel_scales is not None:
        gate_scale = tl.load(channel_scales + columns, inside, other=0.0)
        up_scale = tl.load(channel_scales + size + columns, inside, other=0.0)
    after_previous(PDL)
    activated = _activated(gate_up, row_scales, row, columns, inside, size, gate_scale, up_scale, IN_PTX)
    if out_scales is not None:
        activated = rounded_row(activated, out_scales, row, FP8_LIMIT)
    tl.store(out + row * size + columns, activated.to(out.dtype.element_ty), inside)
