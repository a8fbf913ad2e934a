"""Matrices as the kernels hold them: y = x W^T + b, in float32 or with 8 bits.

A row's result has the same bits whatever other rows there are.

With 8 bits, a weight's row and an activation's row each have one scale, of their largest magnitude; what is read of
memory is a quarter. Scales as in LLM.int8() (Dettmers et al., 2022), section 3, without its columns of outliers.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from services.common.config import ConfigError
from services.worker.cpu_kernels.library import address, kernels
from services.worker.cpu_kernels.structures import Matrix

_LARGEST_WEIGHT = 127
# A row of zeros stays one; the reciprocal is finite.
_TINY = 1e-30
_INPUTS_TOGETHER = 4
"""Inputs whose products with an output's weights of 8 bits are one instruction."""


class PackedMatrix:
    """A weight in the kernels' layout, packed once."""

    def __init__(
        self,
        shape: torch.Size,
        panels: Tensor,
        bias: Tensor | None,
        scales: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """`shape`: [out, in]. The others as `matrix` in matrix.h; they are kept."""
        self._kept = (panels, bias, scales, sums)
        self._shape = shape
        self.structure = Matrix(
            address(panels, panels.dtype),
            None if scales is None else address(scales),
            None if sums is None else address(sums, torch.int32),
            None if bias is None else address(bias),
            num_inputs=shape[1],
            num_outputs=shape[0],
        )
        """How the kernels are told of it. Points to what this object keeps."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Map [num_rows, in] to [num_rows, out], float32."""
        num_outputs, num_inputs = self._shape
        assert rows.shape[1] == num_inputs
        out = rows.new_empty((len(rows), num_outputs))
        rounded, row_scales = torch.empty(rows.shape, dtype=torch.uint8), rows.new_empty(len(rows))
        kernels().shoal_linear(
            ctypes.byref(self.structure),
            address(rows),
            address(rounded, torch.uint8),
            address(row_scales),
            len(rows),
            address(out),
            torch.get_num_threads(),
        )
        return out


def pack_float32(weight: Tensor, bias: Tensor | None) -> PackedMatrix:
    """Copy a weight, [out, in] float32, and a bias, [out]."""
    panels = _in_panels(weight).transpose(1, 2).contiguous()
    return PackedMatrix(weight.shape, panels, None if bias is None else _in_panels(bias).flatten())


def pack_int8(weight: Tensor, bias: Tensor | None) -> PackedMatrix:
    """Round a copy of a weight, [out, in] float32, to 8 bits; copy a bias, [out].

    Raises ConfigError if the inputs are no multiple of 4.
    """
    num_inputs = weight.shape[1]
    if num_inputs % _INPUTS_TOGETHER:
        raise ConfigError(
            f"--weights is 'int8', which takes matrices with a multiple of {_INPUTS_TOGETHER} inputs; "
            f"this model has one with {num_inputs}"
        )
    scales = weight.abs().amax(dim=1).clamp_min_(_TINY) / _LARGEST_WEIGHT
    rounded = _in_panels((weight / scales[:, None]).round_().to(torch.int8))
    fours = rounded.view(*rounded.shape[:2], -1, _INPUTS_TOGETHER)
    return PackedMatrix(
        weight.shape,
        fours.transpose(1, 2).contiguous(),
        None if bias is None else _in_panels(bias).flatten(),
        _in_panels(scales).flatten(),
        rounded.sum(dim=2, dtype=torch.int32).flatten(),
    )


def _in_panels(outputs: Tensor) -> Tensor:
    """Cut what is there for each output, [out, ...], into panels as wide as the kernels', the last one filled up with
    zeros: [num_panels, outputs of a panel, ...].
    """
    panel_outputs: int = kernels().shoal_panel_outputs()
    missing = -len(outputs) % panel_outputs
    filled = pad(outputs, (*[0, 0] * (outputs.ndim - 1), 0, missing))
    return filled.view(-1, panel_outputs, *outputs.shape[1:])
