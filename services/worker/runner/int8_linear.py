"""Products with weights of 8 bits: y = x W^T + b, with a quarter of the memory to read.

A weight's row and an activation's row each have one scale, of their largest magnitude. So a token's result depends
on its own row alone, in any company, since the products are whole numbers. (torch's own dynamic quantization takes one
scale for all rows of a step: a token would be rounded by what others' activations are.) Scales as in LLM.int8()
(Dettmers et al., 2022), section 3, without its columns of outliers.
"""

import torch
from torch import Tensor

_LARGEST_WEIGHT = 127
_CAPABILITIES = torch.cpu.get_capabilities()
# Processors without VNNI add two products in 16 bits: with activations of 7 bits they fit, 2 * 127 * 127 < 2^15.
_LARGEST_ACTIVATION = 127 if _CAPABILITIES.get("avx512_vnni") or _CAPABILITIES.get("avx_vnni") else 63
_ZERO = _LARGEST_ACTIVATION + 1
"""Activations are stored unsigned, which is what the processor's 8-bit products take."""
# A row of zeros stays one; the reciprocal is finite.
_TINY = 1e-30


class Int8Linear:
    """A weight rounded to 8 bits, in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Round a copy of a weight, [out, in] float32. bias: [out]."""
        scales = weight.abs().amax(dim=1).clamp_min_(_TINY) / _LARGEST_WEIGHT
        rounded = (weight / scales[:, None]).round_().to(torch.int8)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._center = torch.tensor(_ZERO + 0.5)
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Map [num_rows, in] to [num_rows, out]."""
        largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True)
        largest.clamp_min_(_TINY)
        # Cut off after a half is added: the nearest whole number.
        rounded = torch.addcmul(self._center, rows, largest.reciprocal(), value=_LARGEST_ACTIVATION).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1 / _LARGEST_ACTIVATION,
            _ZERO,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        product.mul_(largest)
        return product if self._bias is None else product.add_(self._bias)
