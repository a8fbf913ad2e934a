"""Products with weights of 8 bits: y = x W^T + b, with a quarter of the memory to read.

A weight's row and an activation's row each have one scale, of their largest magnitude. So a token's result depends
on its own row alone, in any company, since the products are whole numbers. Scales as in LLM.int8() (Dettmers et al.,
2022), section 3, without its columns of outliers.
"""

import torch
from torch import Tensor

from services.common.config import ConfigError
from services.worker.cpu_kernels.library import address, kernels
from services.worker.runner.linear import in_panels

_LARGEST_WEIGHT = 127
# A row of zeros stays one; the reciprocal is finite.
_TINY = 1e-30
_INPUTS_TOGETHER = 4
"""Inputs whose products with an output's weights are one instruction."""


class Int8Linear:
    """A weight rounded to 8 bits, in the kernel's layout, packed once."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Round a copy of a weight, [out, in] float32. bias: [out].

        Raises ConfigError if the inputs are no multiple of 4.
        """
        self._num_outputs, self._num_inputs = weight.shape
        if self._num_inputs % _INPUTS_TOGETHER:
            raise ConfigError(
                f"--weights is 'int8', which takes matrices with a multiple of {_INPUTS_TOGETHER} inputs; "
                f"this model has one with {self._num_inputs}"
            )
        scales = weight.abs().amax(dim=1).clamp_min_(_TINY) / _LARGEST_WEIGHT
        rounded = in_panels((weight / scales[:, None]).round_().to(torch.int8))
        fours = rounded.view(*rounded.shape[:2], -1, _INPUTS_TOGETHER)
        self._panels = fours.transpose(1, 2).contiguous()
        self._scales = in_panels(scales).flatten()
        self._sums = rounded.sum(dim=2, dtype=torch.int32).flatten()
        self._bias = None if bias is None else in_panels(bias).flatten()

    def __call__(self, rows: Tensor) -> Tensor:
        """Map [num_rows, in] to [num_rows, out]."""
        out = rows.new_empty((rows.shape[0], self._num_outputs))
        self._multiply(rows, out, adds=False)
        return out

    def add_to(self, sums: Tensor, rows: Tensor) -> None:
        """Add what `rows`, [num_rows, in], are mapped to onto `sums`, [num_rows, out]."""
        self._multiply(rows, sums, adds=True)

    def _multiply(self, rows: Tensor, out: Tensor, adds: bool) -> None:
        assert rows.shape[1] == self._num_inputs
        assert out.shape == (rows.shape[0], self._num_outputs)
        rounded = torch.empty(rows.shape, dtype=torch.uint8)
        row_scales = rows.new_empty(rows.shape[0])
        kernels().shoal_linear_int8(
            address(rows),
            address(self._panels, torch.int8),
            address(self._scales),
            address(self._sums, torch.int32),
            None if self._bias is None else address(self._bias),
            address(rounded, torch.uint8),
            address(row_scales),
            address(out),
            rows.shape[0],
            self._num_inputs,
            self._num_outputs,
            adds,
            torch.get_num_threads(),
        )
