"""Products with weights: y = x W^T + b."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from services.worker.cpu_kernels.library import address, kernels


class Linear(Protocol):
    """A matrix that rows are multiplied with."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Map [num_rows, in] to [num_rows, out]."""
        ...

    def add_to(self, sums: Tensor, rows: Tensor) -> None:
        """Add what `rows`, [num_rows, in], are mapped to onto `sums`, [num_rows, out]."""
        ...


class PackedLinear:
    """A float32 weight in the kernel's layout, packed once.

    A row's result has the same bits whatever other rows there are. On 2 cores with AVX-512 the products of a 135M model
    take 11 ms at one row, 14 at eight and 43 at 32, where oneDNN's take 20, 23 and 51; at 512 rows they are even.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Pack a copy of a weight, [out, in] float32. bias: [out]."""
        self._num_outputs, self._num_inputs = weight.shape
        self._panels = in_panels(weight).transpose(1, 2).contiguous()
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
        kernels().shoal_linear_float32(
            address(rows),
            address(self._panels),
            None if self._bias is None else address(self._bias),
            address(out),
            rows.shape[0],
            self._num_inputs,
            self._num_outputs,
            adds,
            torch.get_num_threads(),
        )


def in_panels(outputs: Tensor) -> Tensor:
    """Cut what is there for each output, [out, ...], into panels as wide as the kernels', the last one filled up with
    zeros: [num_panels, outputs of a panel, ...].
    """
    panel_outputs: int = kernels().shoal_panel_outputs()
    missing = -len(outputs) % panel_outputs
    filled = pad(outputs, (*[0, 0] * (outputs.ndim - 1), 0, missing))
    return filled.view(-1, panel_outputs, *outputs.shape[1:])
