"""Rotary position embedding (Su et al., 2021): a complex number a pair of neighbouring dimensions.

Hugging Face pairs dimension i with i + head_dim / 2; such weights are put into this order when they are loaded. One
complex product takes half the time of the three operators that halves need.
"""

import torch
from torch import Tensor


class RotaryTable:
    """The turns of all positions: exp(i * position * frequency)."""

    def __init__(self, num_positions: int, frequencies: Tensor) -> None:
        """frequencies: radians a position, [head_dim / 2] float32."""
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
        self._turns = torch.polar(torch.ones_like(angles), angles)

    def at(self, positions: Tensor) -> Tensor:
        """Pick positions, [num_tokens] int64: [num_tokens, 1, head_dim / 2] complex64."""
        return self._turns[positions].unsqueeze(1)


def rotate_(heads: Tensor, turns: Tensor) -> None:
    """Turn heads in place, [num_tokens, num_heads, head_dim]: a pair (x, y) of dimensions (2i, 2i + 1) becomes
    (x cos - y sin, y cos + x sin). turns: as of `RotaryTable.at`.
    """
    torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2)).mul_(turns)
