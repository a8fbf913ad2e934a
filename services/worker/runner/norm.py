"""Root mean square layer normalization (Zhang and Sennrich, 2019)."""

import torch
from torch import Tensor

from services.worker.cpu_kernels.library import address, kernels


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return rows / sqrt(mean(rows^2) + epsilon) * weight. rows: [num_rows, size]; weight: [size]."""
    out = torch.empty_like(rows)
    num_rows, size = rows.shape
    kernels().shoal_rms_norm(
        address(rows), address(weight), address(out), num_rows, size, epsilon, torch.get_num_threads()
    )
    return out
