"""Rows times a matrix in tiles, each output added up in one order however many the rows; SwiGLU with it, or a sum.

A program takes tile after tile (persistent), so that the bulk copies (TMA) of the next one run while one is written. An
output's inputs are added up from the first to the last by one program, in instructions of one kind: so a row's product
does not depend on the rows beside it, nor on the tiles' sizes. Bound by flops, or with few rows by the matrix's bytes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu
from triton.tools.tensor_descriptor import TensorDescriptor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.rows import Rows

_PROCESSORS = 132
_ROW_TILES_TOGETHER = 16
"""Neighbouring row tiles that are taken before the next outputs: their weights are in the second-level cache then."""
COPY_BYTES = 16
"""What rows are multiples of, for bulk copies."""


@dataclass(frozen=True, slots=True)
class TileTuning:
    """How the kernel is compiled; any choice gives the same."""

    rows: int
    """Of a tile: a multiple of 64, the least that the tensor cores take."""
    outputs: int
    """Of a tile. With SwiGLU half of them are the gate's."""
    input_bytes: int
    """Of a row in one bulk copy."""
    num_stages: int
    num_warps: int


MANY_ROWS = TileTuning(128, 256, 128, 3, 8)
FEW_ROWS = TileTuning(64, 64, 256, 6, 4)


def fits(weight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the kernel takes a matrix: bulk copies begin at multiples of 16 bytes."""
    num_outputs, num_inputs = weight.shape
    return num_inputs * weight.element_size() % COPY_BYTES == 0 == num_outputs * out_dtype.itemsize % COPY_BYTES


def tile_tuning_for(num_rows: int, dtype: torch.dtype) -> TileTuning:
    """Return the tuning for so many rows. float32 is multiplied without the tensor cores, in small tiles."""
    return MANY_ROWS if num_rows > FEW_ROWS.rows and dtype.itemsize <= 2 else FEW_ROWS


def tile_product_reference(rows: Tensor, weight: Tensor) -> Tensor:
    """rows: [num_rows, num_inputs]; weight: [num_outputs, num_inputs]. Returns [num_rows, num_outputs] float32."""
    return rows.float() @ weight.float().T


def product_swiglu_reference(rows: Tensor, weight: Tensor) -> Tensor:
    """weight: [2 * size, num_inputs], the gate's first. Returns silu(gate) * up: [num_rows, size] float32."""
    gate, up = tile_product_reference(rows, weight).chunk(2, dim=1)
    return silu(gate) * up


def tile_product(
    rows: Tensor, weight: Tensor, out: Tensor, tuning: TileTuning | None = None, *, pdl: bool = False
) -> None:
    """As the reference, into `out`, in its type."""
    num_outputs = len(weight)
    assert out.shape == (len(rows), num_outputs)
    _launch(rows, weight, out, num_outputs, tuning, pdl=pdl)


def product_swiglu(
    rows: Tensor, weight: Tensor, out: Tensor, tuning: TileTuning | None = None, *, pdl: bool = False
) -> None:
    """As the reference, into `out`, in its type."""
    size = len(weight) // 2
    assert out.shape == (len(rows), size)
    _launch(rows, weight, out, size, tuning, pdl=pdl)


def add_product(
    rows: Rows,
    weight: Tensor,
    channel_scales: Tensor | None,
    total: Tensor,
    tuning: TileTuning | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Add the product to `total`, [num_rows, num_outputs], in place; it is rounded to its type before.

    The bulk copies that write tiles add them: `total` is read by nobody but the second-level cache.
    """
    assert total.shape == (len(rows.values), len(weight))
    _launch(rows.values, weight, total, len(weight), tuning, pdl=pdl, adds=True, scales=(rows.scales, channel_scales))


def _launch(
    rows: Tensor,
    weight: Tensor,
    out: Tensor,
    num_outputs: int,
    tuning: TileTuning | None,
    *,
    pdl: bool,
    adds: bool = False,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    num_rows, num_inputs = rows.shape
    assert weight.shape[1] == num_inputs
    assert rows.is_contiguous()
    assert weight.is_contiguous()
    assert out.is_contiguous()
    tuning = tuning or tile_tuning_for(num_rows, rows.dtype)
    matrices = len(weight) // num_outputs
    outputs, inputs = tuning.outputs // matrices, tuning.input_bytes // rows.element_size()
    num_tiles = triton.cdiv(num_rows, tuning.rows) * triton.cdiv(num_outputs, outputs)
    _tile_product[(min(num_tiles, _PROCESSORS),)](
        TensorDescriptor.from_tensor(rows, [tuning.rows, inputs]),
        TensorDescriptor.from_tensor(weight.view(matrices, num_outputs, num_inputs), [matrices, outputs, inputs]),
        TensorDescriptor.from_tensor(out, [tuning.rows, outputs]),
        *scales,
        num_rows,
        num_outputs,
        num_inputs,
        ROWS=tuning.rows,
        OUTPUTS=outputs,
        INPUTS=inputs,
        MATRICES=matrices,
        TOGETHER=_ROW_TILES_TOGETHER,
        ADDS=adds,
        HAS_ADDING_COPIES=out.is_cuda,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages if rows.element_size() <= 2 else 1,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _tile_product(
    rows,
    weight,
    out,
    row_scales,
    channel_scales,
    num_rows,
    num_outputs,
    num_inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    MATRICES: tl.constexpr,
    TOGETHER: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_ADDING_COPIES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, ROWS)
    output_tiles = tl.cdiv(num_outputs, OUTPUTS)
    after_previous(PDL)
    for tile in tl.range(tl.program_id(0), row_tiles * output_tiles, tl.num_programs(0), flatten=True):
        group = tile // (TOGETHER * output_tiles)
        rows_of_group = tl.minimum(row_tiles - group * TOGETHER, TOGETHER)
        within = tile % (TOGETHER * output_tiles)
        first_row = (group * TOGETHER + within % rows_of_group) * ROWS
        first_output = within // rows_of_group * OUTPUTS
        total = tl.zeros([ROWS, MATRICES * OUTPUTS], tl.float32)
        for place in range(0, num_inputs, INPUTS):
            x = rows.load([first_row, place])
            # Outputs of a gate and of what it opens for lie in one operand, as if they were neighbours.
            w = tl.reshape(weight.load([0, first_output, place]), [MATRICES * OUTPUTS, INPUTS])
            total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        if MATRICES == 2:
            gate, up = tl.split(tl.trans(tl.reshape(total, [ROWS, 2, OUTPUTS]), 0, 2, 1))
            total = gate / (1.0 + tl.exp(-gate)) * up
        if row_scales is not None:
            row = first_row + tl.arange(0, ROWS)
            output = first_output + tl.arange(0, OUTPUTS)
            row_scale = tl.load(row_scales + row, row < num_rows, other=0.0)
            total = total * row_scale[:, None] * tl.load(channel_scales + output, output < num_outputs, other=0.0)
        rounded = total.to(out.dtype)
        if ADDS and HAS_ADDING_COPIES:
            out.atomic_add([first_row, first_output], rounded)
        elif ADDS:
            out.store([first_row, first_output], out.load([first_row, first_output]) + rounded)
        else:
            out.store([first_row, first_output], rounded)
