"""One row times a matrix, bound by the bytes of the matrix.

A program has one output: it asks for all its weights at once, before the kernel in front is done, and then for the row.
Weights of fp8 are multiplied with the row as it is: at one row rounding it would cost more than it saves.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from services.worker.kernels.launch import after_previous
from services.worker.kernels.peers import Seat, give_outputs


def gemv_reference(row: Tensor, weight: Tensor, channel_scales: Tensor | None) -> Tensor:
    """row: [1, num_inputs]; weight: [num_outputs, num_inputs]. Returns [1, num_outputs] in the row's type."""
    product = row.float() @ weight.float().T
    return (product if channel_scales is None else product * channel_scales).to(row.dtype)


def gemv(row: Tensor, weight: Tensor, channel_scales: Tensor | None, out: Tensor, *, pdl: bool = False) -> None:
    """As the reference, into `out`."""
    num_outputs, num_inputs = weight.shape
    assert row.shape == (1, num_inputs)
    assert out.shape == (1, num_outputs)
    assert weight.is_contiguous()
    block = triton.next_power_of_2(num_inputs)
    num_warps = 2 if block <= 4096 else 4
    _gemv[(num_outputs,)](
        row, weight, channel_scales, out, num_inputs, BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=num_warps
    )


def gemv_and_give(
    row: Tensor, weight: Tensor, channel_scales: Tensor | None, out: Tensor, seat: Seat, *, pdl: bool = False
) -> None:
    """As `gemv`, and gives what is in `out` to the other ranks, whose norms add it up. Outputs are even in number."""
    num_outputs, num_inputs = weight.shape
    assert row.shape == (1, num_inputs)
    assert out.shape == (1, num_outputs)
    assert num_outputs % 2 == 0
    assert seat.num_words == Seat.words_of(num_outputs, out.dtype)
    assert weight.is_contiguous()
    block = triton.next_power_of_2(num_inputs)
    _gemv_and_give[(num_outputs // 2,)](
        row, weight, channel_scales, out, num_inputs, num_outputs, seat.addresses, seat.counts, seat.num_places,
        RANK=seat.rank, WORLD=seat.world_size, BLOCK=block, PDL=pdl, launch_pdl=pdl,
        num_warps=2 if block * weight.element_size() <= 8192 else 4,
    )  # fmt: skip


def gemv_swiglu_reference(row: Tensor, weight: Tensor, channel_scales: Tensor | None) -> Tensor:
    """row: [1, num_inputs]; weight: [2 * size, num_inputs], the gate's first. Returns silu(gate) * up: [1, size]."""
    gate, up = gemv_reference(row.float(), weight, channel_scales).chunk(2, dim=1)
    return (silu(gate) * up).to(row.dtype)


def gemv_swiglu(row: Tensor, weight: Tensor, channel_scales: Tensor | None, out: Tensor, *, pdl: bool = False) -> None:
    """As the reference, into `out`: a program has a gate and what it opens for."""
    num_outputs, num_inputs = weight.shape
    assert row.shape == (1, num_inputs)
    assert out.shape == (1, num_outputs // 2)
    assert weight.is_contiguous()
    block = triton.next_power_of_2(num_inputs)
    _gemv_swiglu[(num_outputs // 2,)](
        row,
        weight,
        channel_scales,
        out,
        num_inputs,
        num_outputs // 2,
        BLOCK=block,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=2 if block <= 4096 else 4,
    )


@triton.jit
def _gemv_swiglu(row, weight, channel_scales, out, num_inputs, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    output = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_inputs
    gate_weights = tl.load(weight + output.to(tl.int64) * num_inputs + columns, inside, other=0.0)
    up_weights = tl.load(weight + (output + size).to(tl.int64) * num_inputs + columns, inside, other=0.0)
    gate_scale = 1.0
    up_scale = 1.0
    if channel_scales is not None:
        gate_scale = tl.load(channel_scales + output)
        up_scale = tl.load(channel_scales + size + output)
    after_previous(PDL)
    x = tl.load(row + columns, inside, other=0.0).to(tl.float32)
    gate = tl.sum(gate_weights.to(tl.float32) * x) * gate_scale
    up = tl.sum(up_weights.to(tl.float32) * x) * up_scale
    tl.store(out + output, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty))


@triton.jit
def _gemv(row, weight, channel_scales, out, num_inputs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    output = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_inputs
    w = tl.load(weight + output.to(tl.int64) * num_inputs + columns, inside, other=0.0)
    scale = 1.0
    if channel_scales is not None:
        scale = tl.load(channel_scales + output)
    after_previous(PDL)
    x = tl.load(row + columns, inside, other=0.0)
    total = tl.sum(w.to(tl.float32) * x.to(tl.float32))
    tl.store(out + output, (total * scale).to(out.dtype.element_ty))


@triton.jit
def _gemv_and_give(
    row,
    weight,
    channel_scales,
    out,
    num_inputs,
    num_outputs,
    addresses,
    counts,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has two outputs, which are a word if they are of 16 bits."""
    first = 2 * tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_inputs
    first_weights = tl.load(weight + first.to(tl.int64) * num_inputs + columns, inside, other=0.0)
    second_weights = tl.load(weight + (first + 1).to(tl.int64) * num_inputs + columns, inside, other=0.0)
    first_scale = 1.0
    second_scale = 1.0
    if channel_scales is not None:
        first_scale = tl.load(channel_scales + first)
        second_scale = tl.load(channel_scales + first + 1)
    after_previous(PDL)
    x = tl.load(row + columns, inside, other=0.0).to(tl.float32)
    first_total = tl.sum(first_weights.to(tl.float32) * x) * first_scale
    second_total = tl.sum(second_weights.to(tl.float32) * x) * second_scale
    outputs = tl.arange(0, 2)
    both = tl.where(outputs == 0, first_total, second_total)
    TYPE: tl.constexpr = out.dtype.element_ty
    the_row = tl.zeros([1], tl.int32)
    give_outputs(
        both[None, :], the_row, the_row == 0, first, num_outputs, addresses, counts, num_places, TYPE, 1, 2, RANK, WORLD
    )
    tl.store(out + first + outputs, both.to(TYPE))
