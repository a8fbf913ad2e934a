"""Residual sum and RMSNorm (Zhang and Sennrich, 2019) in one pass, and the rows' rounding to fp8 where that is wanted.

Bound by bytes; at few rows by the launch: 1.4 us at one row of 4,096 (docs/gpu.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.peers import Seat, seat_arguments, sum_over_ranks
from services.worker.kernels.round_rows import rounded_row
from services.worker.kernels.rows import FP8_MAX, Rows, Scaled, round_rows


def add_rms_norm_reference(
    delta: Scaled | None, residual: Tensor, weight: Tensor, epsilon: float, to_fp8: bool
) -> tuple[Tensor, Rows]:
    """Return the new residual, residual + delta, and its norm. [num_rows, size] both; weight: [size]."""
    if delta is not None:
        residual = (residual.float() + delta.dequantized()).to(residual.dtype)
    rows = residual.float()
    normed = rows * torch.rsqrt((rows * rows).mean(dim=1, keepdim=True) + epsilon) * weight.float()
    return residual, round_rows(normed) if to_fp8 else Rows(normed.to(residual.dtype))


def add_rms_norm(
    delta: Scaled | None,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Rows,
    seat: Seat | None = None,
    *,
    pdl: bool = False,
) -> None:
    """As the reference; `residual` is changed in place, and `out` is written, with scales if it has some.

    With a `seat`, delta is one rank's part of it: what is added is the sum over ranks, of parts in residual's type. Of
    more rows than there are places, some meet after the others.
    """
    num_rows, size = residual.shape
    assert seat is None or (delta is not None and size % 2 == 0)
    assert seat is None or seat.num_words == Seat.words_of(size, residual.dtype)
    assert residual.is_contiguous()
    assert out.values.is_contiguous()
    if delta and seat and num_rows > seat.num_places:
        for first in range(0, num_rows, seat.num_places):
            rows = slice(first, first + seat.num_places)
            add_rms_norm(delta.of(rows), residual[rows], weight, epsilon, out.of(rows), seat, pdl=pdl)
        return
    block = triton.next_power_of_2(size)
    parts = delta.num_parts if delta else 1
    _add_rms_norm[(num_rows,)](
        delta.product if delta else None,
        delta.row_scales if delta else None,
        delta.channel_scales if delta else None,
        residual,
        weight,
        out.values,
        out.scales,
        size,
        delta.product.stride(0) // size if delta is not None and parts > 1 else 0,
        epsilon,
        *seat_arguments(seat),
        RANK=seat.rank if seat else 0,
        WORLD=seat.world_size if seat else 1,
        GIVES=delta is None or not delta.is_given,
        PARTS=parts,
        BLOCK=block,
        FP8_LIMIT=FP8_MAX,
        PDL=pdl,
        launch_pdl=pdl,
        # Parts are of few rows: there it is the time of one that counts.
        num_warps=max(1, min(16, block // (256 if parts > 1 else 512))),
    )


@triton.jit(do_not_specialize=["part_rows"])
def _add_rms_norm(
    delta,
    row_scales,
    channel_scales,
    residual,
    weight,
    out,
    out_scales,
    size,
    part_rows,
    epsilon,
    addresses,
    counts,
    state,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    GIVES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    # Weights do not change: they may be asked for before the kernel in front is done.
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if channel_scales is not None:
        channel_scale = tl.load(channel_scales + columns, inside, other=0.0)
    after_previous(PDL)
    x = tl.load(residual + row * size + columns, inside, other=0.0).to(tl.float32)
    if delta is not None:
        d = tl.load(delta + row * size + columns, inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            d += tl.load(delta + (part * part_rows + row) * size + columns, inside, other=0.0)
        if channel_scales is not None:
            d = d * tl.load(row_scales + row) * channel_scale
        if addresses is not None:
            d = sum_over_ranks(
                d, row, size, addresses, counts, state, num_places, residual.dtype.element_ty, BLOCK, RANK, WORLD, GIVES
            )
        rounded = (x + d).to(residual.dtype.element_ty)
        tl.store(residual + row * size + columns, rounded, inside)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x) / size + epsilon) * w
    if out_scales is not None:
        normed = rounded_row(normed, out_scales, row, FP8_LIMIT)
    tl.store(out + row * size + columns, normed.to(out.dtype.element_ty), inside)
