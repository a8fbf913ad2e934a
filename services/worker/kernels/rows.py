"""Rows of activations as kernels hand them on: in the model's type, or as fp8 (e4m3) with a scale a row.

A product of fp8 rows and fp8 weights is handed on as it is, without its scales: whoever reads it multiplies with them.
So it may come from any library, and its scales cost no pass of their own.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite value of e4m3."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of a product."""

    values: Tensor
    """[num_rows, size]"""
    scales: Tensor | None = None
    """[num_rows] float32, set if `values` are fp8: what they are to be multiplied with."""

    def dequantized(self) -> Tensor:
        """Return what they stand for, in float32."""
        values = self.values.float()
        return values if self.scales is None else values * self.scales[:, None]

    def of(self, rows: slice) -> "Rows":
        """Return some of the rows, not copied."""
        return Rows(self.values[rows], None if self.scales is None else self.scales[rows])


@dataclass(frozen=True, slots=True)
class Scaled:
    """A product, with the scales that are still to be multiplied in."""

    product: Tensor
    """[num_rows, num_outputs], in the model's type; or [num_parts, num_rows, num_outputs] float32, to be added up"""
    row_scales: Tensor | None = None
    """[num_rows] float32. None: there are no scales."""
    channel_scales: Tensor | None = None
    """[num_outputs] float32"""
    is_given: bool = False
    """Whether other ranks were given it already, for a sum over ranks; then it has no scales, and one part."""

    @property
    def num_parts(self) -> int:
        """How many are to be added up."""
        return len(self.product) if self.product.ndim == 3 else 1

    def dequantized(self) -> Tensor:
        """Return what it stands for, in float32."""
        product = self.product.float() if self.product.ndim == 2 else self.product.sum(dim=0)
        if self.row_scales is None or self.channel_scales is None:
            return product
        return product * self.row_scales[:, None] * self.channel_scales

    def of(self, rows: slice) -> "Scaled":
        """Return some of the rows, not copied."""
        scales = None if self.row_scales is None else self.row_scales[rows]
        return replace(self, product=self.product[..., rows, :], row_scales=scales)


def round_rows(values: Tensor) -> Rows:
    """Round rows of any type to fp8; a row's largest magnitude becomes the largest fp8 value."""
    scales = values.float().abs().amax(dim=1).clamp_min(1e-12) / FP8_MAX
    scaled = (values.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX)
    return Rows(scaled.to(FP8), scales)
