"""Multiplies a product's scales in, for who cannot do it while reading: a sum over ranks. Bound by bytes."""

import triton
import triton.language as tl

from services.worker.kernels.launch import after_previous
from services.worker.kernels.rows import Scaled

_BLOCK = 1024


def scale_rows(product: Scaled, *, pdl: bool = False) -> None:
    """Make a product, [num_rows, num_outputs], what `Scaled.dequantized` says of it, in place."""
    assert product.product.ndim == 2
    assert product.product.is_contiguous()
    num_rows, size = product.product.shape
    block = min(_BLOCK, triton.next_power_of_2(size))
    _scale_rows[(num_rows, triton.cdiv(size, block))](
        product.product, product.row_scales, product.channel_scales, size,
        BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip


@triton.jit
def _scale_rows(product, row_scales, channel_scales, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    channel_scale = tl.load(channel_scales + columns, inside, other=0.0)
    after_previous(PDL)
    x = tl.load(product + row * size + columns, inside, other=0.0).to(tl.float32)
    x = x * tl.load(row_scales + row) * channel_scale
    tl.store(product + row * size + columns, x.to(product.dtype.element_ty), inside)
