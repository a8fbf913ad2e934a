"""One row times a matrix, bound by the bytes of the matrix.

A program has one output: it asks for all its weights at once, before the kernel in front is done, and then for the row.
Weights of fp8 are multiplied with the row as it is: at one row rounding it would cost more than it saves.
"""

import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous


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
