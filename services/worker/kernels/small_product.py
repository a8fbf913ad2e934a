"""Few rows times a matrix, bound by the bytes of the matrix; SwiGLU with it.

The weights are the tensor cores' left operand, whose least height is 64, and the rows the right one, whose least width
is 8. Both come by bulk copies (TMA). Rows are a power of two or, where half of it would be for nothing, two of them,
each with a sum of its own. The inputs can be dealt out to several programs; whoever reads the product adds up what they
gave.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.worker.kernels.launch import after_previous, prefetch
from services.worker.kernels.peers import Seat, give_outputs, seat_arguments
from services.worker.kernels.rows import Rows

_LINE_BYTES = 128

MOST_ROWS = 256
_LEAST_ROWS = 16
_MOST_ROWS_OF_ONE_BLOCK = 64
"""Of more it matters what is multiplied for nothing."""


@dataclass(frozen=True, slots=True)
class ProductTuning:
    """How the kernel is compiled and dealt out."""

    outputs: int
    """Of a program: 64 or 128."""
    input_bytes: int
    """Of a weight's row in one bulk copy."""
    num_stages: int
    num_warps: int = 4
    num_splits: int = 1
    """Programs that share the inputs of the same outputs."""


def small_product_reference(rows: Tensor, weight: Tensor, num_splits: int = 1) -> Tensor:
    """rows: [num_rows, num_inputs]; weight: [num_outputs, num_inputs]. Returns [num_splits, num_rows, num_outputs]
    float32, the product of each run of inputs."""
    parts = zip(rows.float().chunk(num_splits, dim=1), weight.float().chunk(num_splits, dim=1), strict=True)
    return torch.stack([x @ w.T for x, w in parts])


def fits(num_rows: int, weight: Tensor, tuning: ProductTuning) -> bool:
    """Whether the kernel takes a product."""
    num_outputs, num_inputs = weight.shape
    block = tuning.input_bytes // weight.element_size()
    return (
        num_rows <= MOST_ROWS
        and weight.element_size() <= 2
        and num_outputs % tuning.outputs == 0
        and num_inputs % (block * tuning.num_splits) == 0
    )


def row_blocks(num_rows: int) -> tuple[int, int]:
    """Return what rows are filled up to: one power of two, or from 65 rows on one and half of it.

    >>> [row_blocks(num_rows) for num_rows in (5, 40, 64, 65, 97, 130, 193)]
    [(16, 0), (64, 0), (64, 0), (64, 32), (128, 0), (128, 64), (256, 0)]
    """
    whole = max(_LEAST_ROWS, triton.next_power_of_2(num_rows))
    if whole > _MOST_ROWS_OF_ONE_BLOCK and num_rows <= whole // 4 * 3:
        return whole // 2, whole // 4
    return whole, 0


def small_product(rows: Tensor, weight: Tensor, out: Tensor, tuning: ProductTuning, *, pdl: bool = False) -> None:
    """As the reference, into `out`, [num_splits, num_rows, num_outputs]. Takes what `fits`."""
    _launch(Rows(rows), weight, None, out, tuning, None, pdl=pdl)


def small_product_swiglu(
    rows: Rows,
    weight: Tensor,
    channel_scales: Tensor | None,
    out: Tensor,
    tuning: ProductTuning,
    *,
    pdl: bool = False,
) -> None:
    """As the references of this product, with scales multiplied in, and of `swiglu`, into `out`,
    [num_rows, num_outputs / 2]. Half of the tuning's outputs are the gate's."""
    _launch(rows, weight, channel_scales, out[None], tuning, None, activates=True, pdl=pdl)


def small_product_and_give(
    rows: Rows,
    weight: Tensor,
    channel_scales: Tensor | None,
    out: Tensor,
    tuning: ProductTuning,
    seat: Seat,
    *,
    pdl: bool = False,
) -> None:
    """As `small_product` in one part, with scales multiplied in, into `out`, [num_rows, num_outputs]; and gives what is
    in `out` to the other ranks, whose norms add it up."""
    assert len(rows.values) <= seat.num_places
    assert seat.num_words == Seat.words_of(len(weight), out.dtype)
    _launch(rows, weight, channel_scales, out[None], tuning, seat, pdl=pdl)


def _launch(
    given: Rows,
    weight: Tensor,
    channel_scales: Tensor | None,
    out: Tensor,
    tuning: ProductTuning,
    seat: Seat | None,
    *,
    activates: bool = False,
    pdl: bool,
) -> None:
    rows, matrices = given.values, 2 if activates else 1
    num_outputs, outputs = len(weight) // matrices, tuning.outputs // matrices
    num_rows, num_inputs = rows.shape
    assert fits(num_rows, weight, tuning)
    assert (channel_scales is None) == (given.scales is None)
    assert out.shape == (tuning.num_splits, num_rows, num_outputs)
    assert rows.is_contiguous()
    assert weight.is_contiguous()
    assert out.is_contiguous()
    block = tuning.input_bytes // weight.element_size()
    block_rows, more_rows = row_blocks(num_rows)
    addresses, counts, _, num_places = seat_arguments(seat)
    there = _with_rows_behind(rows, block_rows + more_rows)
    _small_product[(num_outputs // outputs, tuning.num_splits)](
        TensorDescriptor.from_tensor(there, [block_rows, block]),
        TensorDescriptor.from_tensor(there, [more_rows, block]) if more_rows else None,
        TensorDescriptor.from_tensor(weight, [outputs, block]),
        weight,
        out,
        given.scales,
        channel_scales,
        num_rows,
        num_outputs,
        num_inputs,
        num_inputs // tuning.num_splits,
        addresses,
        counts,
        num_places,
        RANK=seat.rank if seat else 0,
        WORLD=seat.world_size if seat else 1,
        LINE=_LINE_BYTES // weight.element_size(),
        LINES_AHEAD=_lines_ahead(num_rows, weight, tuning),
        ROWS=block_rows,
        MORE_ROWS=more_rows,
        OUTPUTS=outputs,
        ACTIVATES=activates,
        INPUTS=block,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


def _with_rows_behind(rows: Tensor, most: int) -> Tensor:
    """Return `rows`, and of what lies behind them in memory as many that they are `most`, if it is there.

    A bulk copy of 128 rows of which 96 or 72 are there takes longer than one of 128, and what comes of a row is in no
    other row's product.
    """
    num_rows, size = rows.shape
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    return rows.as_strided((min(most, room // size), size), (size, 1)) if room >= (num_rows + 1) * size else rows


def _lines_ahead(num_rows: int, weight: Tensor, tuning: ProductTuning) -> int:
    """Cache lines of each weight's row that are asked for ahead, a power of two: about what the pipeline holds, or, of
    bf16 for few rows, a quarter, which takes 1 % less of a step."""
    row_bytes = weight.shape[1] * weight.element_size()
    held = min(tuning.num_stages * tuning.input_bytes, row_bytes // tuning.num_splits) // _LINE_BYTES
    wanted = held // 4 if weight.element_size() == 2 and num_rows <= _MOST_ROWS_OF_ONE_BLOCK else held
    return 1 << max(0, wanted.bit_length() - 1)


@triton.jit(do_not_specialize=["num_rows"])
def _small_product(
    rows,
    more_rows,
    weight,
    weights,
    out,
    row_scales,
    channel_scales,
    num_rows,
    num_outputs,
    num_inputs,
    inputs_a_split,
    addresses,
    counts,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LINE: tl.constexpr,
    LINES_AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    MORE_ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATES: tl.constexpr,
    INPUTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (outputs, split)."""
    first_output = tl.program_id(0) * OUTPUTS
    split = tl.program_id(1)
    first_input = split * inputs_a_split
    if PDL:
        # Weights do not change. While the kernel in front works on a few rows the memory is idle: the first tiles of
        # all programs, some MB, come into the cache meanwhile.
        lines_ahead = first_input + tl.arange(0, LINES_AHEAD)[None, :] * LINE
        output = (first_output + tl.arange(0, OUTPUTS)).to(tl.int64)[:, None]
        prefetch(weights + output * num_inputs + lines_ahead)
        if ACTIVATES:
            prefetch(weights + (num_outputs + output) * num_inputs + lines_ahead)
    after_previous(PDL)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    more = tl.zeros([OUTPUTS, MORE_ROWS if MORE_ROWS else 1], tl.float32)
    up = tl.zeros_like(total)
    more_up = tl.zeros_like(more)
    for place in range(first_input, first_input + inputs_a_split, INPUTS):
        w = weight.load([first_output, place])
        x = tl.trans(rows.load([0, place]))
        total = tl.dot(w, x, total)
        if ACTIVATES:
            w_up = weight.load([num_outputs + first_output, place])
            up = tl.dot(w_up, x, up)
        if MORE_ROWS:
            x = tl.trans(more_rows.load([ROWS, place]))
            more = tl.dot(w, x, more)
            if ACTIVATES:
                more_up = tl.dot(w_up, x, more_up)
    _give(
        total, up, 0, out, row_scales, channel_scales, first_output, split, num_rows, num_outputs, addresses, counts,
        num_places, RANK, WORLD, ROWS, OUTPUTS, ACTIVATES,
    )  # fmt: skip
    if MORE_ROWS:
        _give(
            more, more_up, ROWS, out, row_scales, channel_scales, first_output, split, num_rows, num_outputs, addresses,
            counts, num_places, RANK, WORLD, MORE_ROWS, OUTPUTS, ACTIVATES,
        )  # fmt: skip


@triton.jit
def _give(
    total,
    up,
    first_row,
    out,
    row_scales,
    channel_scales,
    first_output,
    split,
    num_rows,
    num_outputs,
    addresses,
    counts,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATES: tl.constexpr,
):
    """Store a program's outputs of rows, total: [OUTPUTS, ROWS]."""
    columns = first_output + tl.arange(0, OUTPUTS)
    row = first_row + tl.arange(0, ROWS)
    if channel_scales is not None:
        row_scale = tl.load(row_scales + row, row < num_rows, other=0.0)[None, :]
        total = total * row_scale * tl.load(channel_scales + columns)[:, None]
        if ACTIVATES:
            up = up * row_scale * tl.load(channel_scales + num_outputs + columns)[:, None]
    if ACTIVATES:
        total = total / (1.0 + tl.exp(-total)) * up
    if addresses is not None:
        give_outputs(
            tl.trans(total), row, row < num_rows, first_output, num_outputs, addresses, counts, num_places,
            out.dtype.element_ty, ROWS, OUTPUTS, RANK, WORLD,
        )  # fmt: skip
    places = (split * num_rows + row)[None, :] * num_outputs + columns[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), (row < num_rows)[None, :])
