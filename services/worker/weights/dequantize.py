"""Tensors as GGUF files store them, to float32."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from services.common.model.ggml_types import BF16, F16, F32, GGML_TYPES, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0


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


def _from_bf16(data: Tensor, out: Tensor) -> None:
    out.view(-1).copy_(_aligned(data).view(torch.bfloat16))


def _from_q4_0(data: Tensor, out: Tensor) -> None:
    """Blocks of 32 values in 18 bytes: d in float16, 16 bytes of nibbles as in Q4_1; value = d * (nibble - 8)."""
    blocks = data.view(-1, GGML_TYPES[Q4_0].block_bytes)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    nibbles = blocks[:, 2:]
    values = out.view(-1, 2, 16)
    values[:, 0] = nibbles & 15
    values[:, 1] = nibbles >> 4
    values.sub_(8).mul_(d.unsqueeze(2))


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


def _from_q4_k(data: Tensor, out: Tensor) -> None:
    """Blocks of 256 values in 144 bytes: d and dmin in float16, 12 bytes of 6-bit scales and minimums, 128 bytes of
    nibbles. Of each 32 of these bytes, the low nibbles are one group of 32 values and the high nibbles the next.
    Value = d * scale * nibble - dmin * minimum, with a scale and a minimum for each of the 8 groups.
    """
    blocks = data.view(-1, GGML_TYPES[Q4_K].block_bytes)
    d, dmin = blocks[:, :4].contiguous().view(torch.float16).float().unsqueeze(2).unbind(1)
    # Three times 4 bytes. The first 4 scales are the low 6 bits of the first, the first 4 minimums those of the second.
    # The others have their low 4 bits in the third, their high 2 bits on top of the first and the second.
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    nibbles = blocks[:, 16:].view(-1, 4, 32)
    values = out.view(-1, 4, 2, 32)
    values[:, :, 0] = nibbles & 15
    values[:, :, 1] = nibbles >> 4
    groups = out.view(-1, 8, 32)
    groups.mul_((d * scales).unsqueeze(2)).sub_((dmin * minimums).unsqueeze(2))


def _from_q6_k(data: Tensor, out: Tensor) -> None:
    """Blocks of 256 values in 210 bytes: 128 bytes of low 4 bits, 64 of high 2 bits, 16 int8 scales, d in float16.

    Each half of a block is 4 runs of 32 values: their low bits are the low nibbles of 64 bytes, then the high ones;
    their high bits are bits 0-1, 2-3, 4-5 and 6-7 of 32 bytes. Value = d * scale * (bits - 32), a scale for each 16.
    """
    blocks = data.view(-1, GGML_TYPES[Q6_K].block_bytes)
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    scales = blocks[:, 192:208].view(torch.int8)
    d = blocks[:, 208:].contiguous().view(torch.float16).float()
    runs = out.view(-1, 2, 4, 32)
    for run in range(4):
        nibbles = low[:, :, run % 2] & 15 if run < 2 else low[:, :, run % 2] >> 4
        runs[:, :, run] = nibbles | (((high >> (2 * run)) & 3) << 4)
    out.view(-1, 16, 16).sub_(32).mul_((d * scales).unsqueeze(2))


def _aligned(data: Tensor) -> Tensor:
    """Copy bytes whose place in a file may be odd, so that they can be seen as wider numbers."""
    return data.clone()


SUPPORTED_TYPES: Mapping[int, Callable[[Tensor, Tensor], None]] = {
    F32: _from_f32,
    F16: _from_f16,
    BF16: _from_bf16,
    Q4_0: _from_q4_0,
    Q4_1: _from_q4_1,
    Q4_K: _from_q4_k,
    Q6_K: _from_q6_k,
    Q8_0: _from_q8_0,
}
