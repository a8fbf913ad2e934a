"""Rounding rows to fp8: for kernels that have a row whole, and by itself where none in front has."""

import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.rows import FP8_MAX, Rows


def round_rows_into(values: Tensor, out: Rows, *, pdl: bool = False) -> None:
    """As `rows.round_rows`, into `out`. values: [num_rows, size], contiguous."""
    num_rows, size = values.shape
    assert values.is_contiguous()
    assert out.values.is_contiguous()
    block = triton.next_power_of_2(size)
    _round_rows[(num_rows,)](
        values,
        out.values,
        out.scales,
        size,
        BLOCK=block,
        FP8_LIMIT=FP8_MAX,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=max(1, min(16, block // 512)),
    )


@triton.jit
def rounded_row(x, out_scales, row, FP8_LIMIT: tl.constexpr):
    """Store the scale of a row, x, float32, with 0 beyond its end; return what is to be stored of it as fp8."""
    largest = tl.maximum(tl.max(tl.abs(x)), 1e-12)
    tl.store(out_scales + row, largest / FP8_LIMIT)
    # The largest becomes the limit or a bit more, and that is rounded to the limit.
    return x * (FP8_LIMIT / largest)


@triton.jit
def _round_rows(values, out, out_scales, size, BLOCK: tl.constexpr, FP8_LIMIT: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    after_previous(PDL)
    x = tl.load(values + row * size + columns, inside, other=0.0).to(tl.float32)
    x = rounded_row(x, out_scales, row, FP8_LIMIT)
    tl.store(out + row * size + columns, x.to(out.dtype.element_ty), inside)
