"""Rotary position embedding (Su et al., 2021): a turn for each pair of neighbouring dimensions.

Hugging Face pairs dimension i with i + head_dim / 2; such weights are put into this order when they are loaded.
"""

import torch
from torch import Tensor


def rotary_table(num_positions: int, frequencies: Tensor) -> Tensor:
    """Return the cosine and sine of position * frequency: [num_positions, head_dim / 2, 2].

    frequencies: radians a position, [head_dim / 2] float32.
    """
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=2)
