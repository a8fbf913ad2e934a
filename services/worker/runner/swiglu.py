"""The gate of a feed-forward layer (Shazeer, 2020: SwiGLU)."""

import torch
from torch import Tensor

from services.worker.cpu_kernels.library import address, kernels


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up. gate_up: [num_rows, 2 * size], the gate first. Returns [num_rows, size]."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    kernels().shoal_swiglu(address(gate_up), address(out), num_rows, size, torch.get_num_threads())
    return out
