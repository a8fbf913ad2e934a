"""Few rows times a matrix, bound by the bytes of the matrix.

The weights are the tensor cores' left operand, whose least height is 64, and the rows the right one, whose least width
is 8. Both come by bulk copies (TMA). The inputs can be dealt out to several programs; whoever reads the product adds up
what they gave.
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

MOST_ROWS = 64


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


def small_product(rows: Tensor, weight: Tensor, out: Tensor, tuning: ProductTuning, *, pdl: bool = False) -> None:
    """As the reference, into `out`, [num_splits, num_rows, num_outputs]. Takes what `fits`."""
    _launch(Rows(rows), weight, None, out, tuning, None, pdl=pdl)


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
    assert tuning.num_splits == 1
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
    pdl: bool,
) -> None:
    rows, num_outputs = given.values, len(weight)
    num_rows, num_inputs = rows.shape
    assert fits(num_rows, weight, tuning)
    assert (channel_scales is None) == (given.scales is None)
    assert out.shape == (tuning.num_splits, num_rows, num_outputs)
    assert rows.is_contiguous()
    assert weight.is_contiguous()
    assert out.is_contiguous()
    block = tuning.input_bytes // weight.element_size()
    block_rows = max(16, triton.next_power_of_2(num_rows))
    addresses, counts, _, num_places = seat_arguments(seat)
    _small_product[(num_outputs // tuning.outputs, tuning.num_splits)](
        TensorDescriptor.from_tensor(rows, [block_rows, block]),
        TensorDescriptor.from_tensor(weight, [tuning.outputs, block]),
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
        LINES_AHEAD=_lines_ahead(tuning, num_inputs * weight.element_size()),
        ROWS=block_rows,
        OUTPUTS=tuning.outputs,
        INPUTS=block,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


def _lines_ahead(tuning: ProductTuning, row_bytes: int) -> int:
    """Cache lines of each weight's row that are asked for ahead: about what the pipeline holds, a power of two."""
    wanted = min(tuning.num_stages * tuning.input_bytes, row_bytes // tuning.num_splits) // _LINE_BYTES
    return 1 << max(0, wanted.bit_length() - 1)


@triton.jit(do_not_specialize=["num_rows"])
def _small_product(
    rows,
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
    OUTPUTS: tl.constexpr,
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
        outputs_ahead = (first_output + tl.arange(0, OUTPUTS)).to(tl.int64)[:, None] * num_inputs
        lines_ahead = first_input + tl.arange(0, LINES_AHEAD)[None, :] * LINE
        prefetch(weights + outputs_ahead + lines_ahead)
    after_previous(PDL)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for place in range(first_input, first_input + inputs_a_split, INPUTS):
        w = weight.load([first_output, place])
        x = rows.load([0, place])
        total = tl.dot(w, tl.trans(x), total)
    columns = first_output + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    if channel_scales is not None:
        total = total * tl.load(row_scales + row, row < num_rows, other=0.0)[None, :]
        total = total * tl.load(channel_scales + columns)[:, None]
    if addresses is not None:
        give_outputs(
            tl.trans(total), row, row < num_rows, first_output, num_outputs, addresses, counts, num_places,
            out.dtype.element_ty, ROWS, OUTPUTS, RANK, WORLD,
        )  # fmt: skip
    places = (split * num_rows + row)[None, :] * num_outputs + columns[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), (row < num_rows)[None, :])
