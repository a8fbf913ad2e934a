"""A matrix on the device, and the fastest way known to multiply with it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from services.worker.kernels.gemv import gemv
from services.worker.kernels.rows import FP8, FP8_MAX, Rows, Scaled

DeviceWeightFormat = Literal["float32", "bf16", "fp8"]
"""How the device holds the matrices of the layers. fp8: rounded to e4m3 with a scale for each output; what they are
multiplied with is rounded row by row, and all else is bf16."""

ACTIVATIONS: dict[DeviceWeightFormat, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""The type of residuals, norms and the cache."""


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """y = x W^T; a bias, if there is one, is added by whoever reads y."""

    values: Tensor
    """[num_outputs, num_inputs], in the activations' type or fp8"""
    channel_scales: Tensor | None = None
    """[num_outputs] float32, if `values` are fp8"""
    bias: Tensor | None = None
    """[num_outputs] float32"""

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads of it."""
        return self.values.numel() * self.values.element_size()


def wants_fp8(matrix: DeviceMatrix, num_rows: int) -> bool:
    """Whether `multiply` takes rows rounded to fp8: of one row it takes the row as it is, see `gemv`."""
    return matrix.channel_scales is not None and num_rows > 1


def multiply(rows: Rows, matrix: DeviceMatrix, out: Tensor, one: Tensor, *, pdl: bool) -> Scaled:
    """Multiply rows into `out`, [num_rows, num_outputs].

    `one` is a 1.0 on the device: cuBLAS is to apply no scales. With them, a row each, it takes 13 us at the least and
    cannot split the inputs (docs/gpu.md); so they are left to whoever reads the product.
    """
    if len(rows.values) == 1:
        gemv(rows.values, matrix.values, matrix.channel_scales, out, pdl=pdl)
        return Scaled(out)
    if matrix.channel_scales is None:
        torch.mm(rows.values, matrix.values.T, out=out)
        return Scaled(out)
    if out.is_cuda:
        torch._scaled_mm(rows.values, matrix.values.T, one, one, out_dtype=out.dtype, use_fast_accum=True, out=out)
    else:
        out.copy_(rows.values.float() @ matrix.values.float().T)
    return Scaled(out, rows.scales, matrix.channel_scales)


def to_fp8(weight: Tensor, bias: Tensor | None = None) -> DeviceMatrix:
    """Round a weight: an output's largest magnitude becomes the largest fp8 value."""
    scales = weight.abs().amax(dim=1).float().clamp_min(1e-12) / FP8_MAX
    values = (weight / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return DeviceMatrix(values, scales, bias)
