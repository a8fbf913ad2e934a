"""A matrix on the device, and the fastest way known to multiply with it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from services.worker.kernels import tile_product
from services.worker.kernels.gemv import gemv, gemv_and_give
from services.worker.kernels.peers import Seat
from services.worker.kernels.rope_kv import HeadWeights
from services.worker.kernels.rows import FP8, FP8_MAX, Rows, Scaled
from services.worker.kernels.small_product import (
    MOST_ROWS,
    ProductTuning,
    fits,
    small_product,
    small_product_and_give,
)
from services.worker.weight_format import DeviceWeightFormat

ACTIVATIONS: dict[DeviceWeightFormat, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""The type of residuals, norms and the cache."""

MOST_PARTS = 2
_MANY_OUTPUTS = 16384
_CUBLAS_SCALES_FROM_ROWS = 512
_CUBLAS_SCALES_FROM_ROWS_OF_MANY_OUTPUTS = 256
"""Of fp8: from there on cuBLAS applies a scale a row and a channel for less than the kernel behind it."""
_SWIGLU_IN_TILES_FROM_ROWS = 8192
"""Of bf16: from there on SwiGLU in its product's tiles spares more than cuBLAS is ahead of them."""
_ADDING_FROM_ROWS = 4096
"""From there on a product that is added to the residual by itself spares the norm more than it takes longer."""
_FEW_ROWS = 64
_MOST_ROWS_TURNED_IN_PARTS = 32
"""Of queries, keys and values: of 64 rows their product gains nothing by parts in bf16, and 0.4 us in fp8."""
_TURNED_IN_PARTS = ProductTuning(64, 256, 3, num_splits=2)
_GEMV_MOST_FP8_WEIGHTS = 32 << 20
"""Of a matrix of fp8 that `gemv` multiplies as fast as the tensor cores do, with the rounding that these want."""
_GIVING_MOST_BYTES = 8192
"""Of an output's weights: with more, `gemv_and_give`, whose programs have two, takes longer than giving in the norm."""
_OUTPUTS_OF_ALL_PROCESSORS = 8192
"""So many are programs for all processors without a part of the inputs each."""


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


PartsReader = Literal["norm", "rope"]
"""The kernel behind a product, if it adds up what comes in parts: `add_rms_norm` or `rope_and_write`."""
Activation = Literal["gemv", "tiles", "apart"] | ProductTuning
"""SwiGLU in a product of one row, in one of many, in a kernel behind it, or in a product of few rows, so tuned."""


class Multiplier:
    """Multiplies rows with matrices, choosing how by their number. Tables are of docs/gpu-kernels.md, for one H200."""

    def __init__(
        self, normed_outputs: int, turned_outputs: int, device: torch.device, *, is_batch_invariant: bool = False
    ) -> None:
        """`normed_outputs`, `turned_outputs`: of the largest matrices whose products may come in parts, to a norm and
        to the rotary kernel.

        `is_batch_invariant`: all products by the one kernel that gives a row the same among any others.
        """
        self._is_batch_invariant = is_batch_invariant
        # To few rows cuBLAS is to apply no scales. With some it takes 13 us at the least and cannot split the inputs,
        # so they are left to whoever reads the product.
        self._one = torch.ones((), dtype=torch.float32, device=device)
        # One room for all products in parts, since each is read by the kernel directly behind it. Kernels may begin
        # early, but touch it only when the one in front has ended, which had waited so for the one before it: by the
        # time that a product writes parts, all readers of those before have ended (`kernels/launch.py`).
        size = MOST_PARTS * max(MOST_ROWS * normed_outputs, _MOST_ROWS_TURNED_IN_PARTS * turned_outputs)
        self._parts = torch.zeros(size, dtype=torch.float32, device=device)

    def __call__(
        self,
        rows: Rows,
        matrix: DeviceMatrix,
        out: Tensor,
        *,
        parts_for: PartsReader | None = None,
        pdl: bool,
        seat: Seat | None = None,
    ) -> Scaled:
        """Multiply rows; into `out`, [num_rows, num_outputs], unless the product comes in parts, for the kernel
        directly behind.

        With a `seat` where the norm behind sums it over ranks, it is given there, if that is done while it is made.
        """
        num_rows, weight = len(rows.values), matrix.values
        if self._is_batch_invariant:
            tile_product.tile_product(rows.values, weight, out, pdl=pdl)
            return Scaled(out) if rows.scales is None else Scaled(out, rows.scales, matrix.channel_scales)
        if num_rows == 1 and rows.scales is None:
            if seat and weight[0].nbytes <= _GIVING_MOST_BYTES:
                gemv_and_give(rows.values, weight, matrix.channel_scales, out, seat, pdl=pdl)
                return Scaled(out, is_given=True)
            gemv(rows.values, weight, matrix.channel_scales, out, pdl=pdl)
            return Scaled(out)
        tuning = tuning_for(num_rows, weight, parts_for) if weight.is_cuda else None
        if tuning and tuning.num_splits == 1 and seat and num_rows <= seat.num_places:
            small_product_and_give(rows, weight, matrix.channel_scales, out, tuning, seat, pdl=pdl)
            return Scaled(out, is_given=True)
        product = out
        if tuning:
            if tuning.num_splits > 1:
                size = tuning.num_splits * out.numel()
                product = self._parts[:size].view(tuning.num_splits, *out.shape)
            small_product(rows.values, weight, product.view(tuning.num_splits, *out.shape), tuning, pdl=pdl)
        elif matrix.channel_scales is None or rows.scales is None:
            torch.mm(rows.values, weight.T, out=out)
        elif weight.is_cuda and _takes_scales(num_rows, weight):
            scales = rows.scales[:, None], matrix.channel_scales[None, :]
            torch._scaled_mm(rows.values, weight.T, *scales, out_dtype=out.dtype, use_fast_accum=True, out=out)
            return Scaled(out)
        elif weight.is_cuda:
            torch._scaled_mm(
                rows.values, weight.T, self._one, self._one, out_dtype=out.dtype, use_fast_accum=True, out=out
            )
        else:
            out.copy_(rows.values.float() @ weight.float().T)
        return Scaled(product) if rows.scales is None else Scaled(product, rows.scales, matrix.channel_scales)

    def may_add(self, rows: Rows, matrix: DeviceMatrix) -> bool:
        """Whether `add` takes a product, and is worth it."""
        if self._is_batch_invariant or len(rows.values) < _ADDING_FROM_ROWS:
            return False
        return matrix.channel_scales is None or tile_product.fits(matrix.values, torch.bfloat16)

    def add(self, rows: Rows, matrix: DeviceMatrix, total: Tensor) -> None:
        """Add a product to `total`, [num_rows, num_outputs], in place: the norm behind it has no sum to make."""
        if matrix.channel_scales is None:
            torch.addmm(total, rows.values, matrix.values.T, out=total)
        else:
            tile_product.add_product(rows, matrix.values, matrix.channel_scales, total)

    def wants_fp8(self, matrix: DeviceMatrix, num_rows: int) -> bool:
        """Whether a product takes rows rounded to fp8.

        Of one row and a small matrix it takes the row as it is: rounding it would cost more than the tensor cores save.
        Of a large one the conversion of the weights, which `gemv` does one by one, takes longer than reading them.
        """
        if matrix.channel_scales is None:
            return False
        return self._is_batch_invariant or num_rows > 1 or matrix.values.numel() > _GEMV_MOST_FP8_WEIGHTS

    def may_turn(self, rows: Rows, heads: HeadWeights) -> bool:
        """Whether queries and keys are turned in the product that makes them: that of one row as it is."""
        is_one = len(rows.values) == 1 and rows.scales is None and not self._is_batch_invariant
        return is_one and heads.qk_norm is None

    def how_to_activate(self, rows: Rows, gate_up: DeviceMatrix, *, to_fp8: bool) -> Activation:
        """Return how rows are multiplied with a gate and what it opens for. `to_fp8`: what comes out is rounded."""
        num_rows = len(rows.values)
        if self._is_batch_invariant:
            return "apart"
        if num_rows == 1 and rows.scales is None and not to_fp8:
            return "gemv"
        is_half = gate_up.values.is_cuda and gate_up.values.element_size() == 2
        if gate_up.values.is_cuda and (tuning := swiglu_tuning_for(num_rows, gate_up.values)):
            return tuning
        if is_half and num_rows >= _SWIGLU_IN_TILES_FROM_ROWS and tile_product.fits(gate_up.values, rows.values.dtype):
            return "tiles"
        return "apart"


def _takes_scales(num_rows: int, weight: Tensor) -> bool:
    has_many_outputs = len(weight) >= _MANY_OUTPUTS
    return num_rows >= (_CUBLAS_SCALES_FROM_ROWS_OF_MANY_OUTPUTS if has_many_outputs else _CUBLAS_SCALES_FROM_ROWS)


def tuning_for(num_rows: int, weight: Tensor, parts_for: PartsReader | None = None) -> ProductTuning | None:
    """Return how the kernel for few rows is to multiply; None: cuBLAS is faster.

    By `python -m services.worker.benchmark.tune`; within 2 % of the best of each shape.
    """
    may_turn_parts = num_rows <= _MOST_ROWS_TURNED_IN_PARTS and len(weight) < _MANY_OUTPUTS
    if parts_for == "rope" and may_turn_parts and fits(num_rows, weight, _TURNED_IN_PARTS):
        return _TURNED_IN_PARTS
    choose = _tuning_for_few if num_rows <= _FEW_ROWS else _tuning_for_some
    # In one part where inputs cannot be dealt out, as 18,944 of fp8 cannot in copies of 512.
    tunings = (choose(num_rows, weight, may_split) for may_split in (parts_for == "norm", False))
    return next((tuning for tuning in tunings if tuning and fits(num_rows, weight, tuning)), None)


def _tuning_for_few(num_rows: int, weight: Tensor, may_split: bool) -> ProductTuning:
    num_outputs, num_inputs = weight.shape
    if num_outputs >= _MANY_OUTPUTS:
        return ProductTuning(128, 256, 4)
    if num_outputs > num_inputs:
        return ProductTuning(64, 256, 4)
    if not may_split or num_outputs >= _OUTPUTS_OF_ALL_PROCESSORS:
        return ProductTuning(64, 256, 6)
    if num_rows > 32:
        return ProductTuning(64, 256, 6, num_splits=2)
    return ProductTuning(64, 512, 4 if weight.element_size() == 1 or num_rows <= 16 else 3, num_splits=2)


def _tuning_for_some(num_rows: int, weight: Tensor, may_split: bool) -> ProductTuning | None:
    """Of more rows: in bf16 where inputs are dealt out."""
    num_outputs, num_inputs = weight.shape
    deals_out = may_split and num_outputs <= num_inputs and num_outputs < _OUTPUTS_OF_ALL_PROCESSORS
    if weight.element_size() == 1 or not deals_out or num_rows > 192:
        return None
    return ProductTuning(64, 256, 4, num_splits=2) if num_rows <= 128 else ProductTuning(64, 128, 6, num_splits=2)


def swiglu_tuning_for(num_rows: int, gate_up: Tensor) -> ProductTuning | None:
    """Return how the kernel for few rows is to multiply with SwiGLU in it; None: apart they are faster."""
    is_fp8 = gate_up.element_size() == 1
    # One row in fp8 is left to `gemv_swiglu`, or to SwiGLU in the kernel that rounds.
    if len(gate_up) < _MANY_OUTPUTS or (is_fp8 and num_rows == 1):
        return None
    if is_fp8 and num_rows <= 16:
        tuning = ProductTuning(128, 128, 3)
    elif num_rows <= _FEW_ROWS:
        tuning = ProductTuning(128, 256, 4)
    elif num_rows <= 128:
        tuning = ProductTuning(128, 128, 3)
    elif (num_rows - 1) % 64 < 32:
        # Such a number cuBLAS fills up by less than this kernel.
        return None
    else:
        tuning = ProductTuning(128, 128, 5) if num_rows <= 192 else ProductTuning(128, 128, 4, num_warps=8)
    return tuning if fits(num_rows, gate_up, tuning) else None


def to_fp8(weight: Tensor, bias: Tensor | None = None) -> DeviceMatrix:
    """Round a weight: an output's largest magnitude becomes the largest fp8 value."""
    scales = weight.abs().amax(dim=1).float().clamp_min(1e-12) / FP8_MAX
    values = (weight / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return DeviceMatrix(values, scales, bias)
