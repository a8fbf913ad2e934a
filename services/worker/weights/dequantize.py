"""Tensors as GGUF files store them, to float32."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from services.common.model.ggml_types import F16, F32, GGML_TYPES, Q4_1, Q8_0


def dequantize(data: Tensor, ggml_type: int, out: Tensor) -> None:
    """Write a stored tensor's values to `out`.

    data: the stored bytes, [num_bytes] uint8. out: contiguous float32 of as many values. Raises KeyError for a type
    that is not in `SUPPORTED_TYPES`.
    """
    SUPPORTED_TYPES[ggml_type](data, out)


def _from_f32(data: Tensor, out: Tensor) -> None:
    out.view(-1).copy_(_aligned(data).view(torch.float32))


def _from_f16(data: Tensor, out: Tensor) -> None:
    out.view(-1).copy_(_aligned(data).view(torch.float16))


def _from_q4_1(data: Tensor, out: Tensor) -> None:
    """Blocks of 32 values in 20 bytes: d and m in float16, 16 bytes whose low nibbles are values 0 to 15, whose high
    nibbles are values 16 to 31; value = d * nibble + m."""
    blocks = data.view(-1, GGML_TYPES[Q4_1].block_bytes)
    d, m = blocks[:, :4].contiguous().view(torch.float16).float().unsqueeze(2).unbind(1)
    nibbles = blocks[:, 4:]
    values = out.view(-1, 2, 16)
    values[:, 0] = nibbles & 15
    values[:, 1] = nibbles >> 4
    values.mul_(d.unsqueeze(2)).add_(m.unsqueeze(2))


def _from_q8_0(data: Tensor, out: Tensor) -> None:
    """Blocks of 32 values in 34 bytes: d in float16, 32 int8; value = d * int8."""
    blocks = data.view(-1, GGML_TYPES[Q8_0].block_bytes)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    values = out.view(-1, 32)
    values.copy_(blocks[:, 2:].view(torch.int8))
    values.mul_(d)


def _aligned(data: Tensor) -> Tensor:
    """Copy bytes whose place in a file may be odd, so that they can be seen as wider numbers."""
    return data.clone()


SUPPORTED_TYPES: Mapping[int, Callable[[Tensor, Tensor], None]] = {
    F32: _from_f32,
    F16: _from_f16,
    Q4_1: _from_q4_1,
    Q8_0: _from_q8_0,
}
