"""Rotary position embedding (Su et al., 2021), in the layout of Hugging Face: halves of a head are turned together."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """Cosines and sines of some positions."""

    cos: Tensor
    """[num_positions, 1, 2, head_dim / 2]; both halves are the same."""
    signed_sin: Tensor
    """[num_positions, 1, 2, head_dim / 2]; the first half is negated."""

    def at(self, positions: Tensor) -> "RotaryAngles":
        """Pick positions: [num_tokens] int64."""
        return RotaryAngles(self.cos[positions], self.signed_sin[positions])

    def rotate_(self, heads: Tensor) -> None:
        """Turn heads in place, [num_positions, num_heads, head_dim]: pairs (x, y) of dimensions (i, i + head_dim / 2)
        become (x cos - y sin, y cos + x sin)."""
        halves = heads.view(*heads.shape[:2], 2, -1)
        swapped = halves.flip(2)
        torch.addcmul(halves * self.cos, swapped, self.signed_sin, out=halves)


def rotary_table(num_positions: int, frequencies: Tensor) -> RotaryAngles:
    """Return the angles of all positions: position * frequency. frequencies: [head_dim / 2]."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)[:, None, None, :]
    cos, sin = angles.cos(), angles.sin()
    return RotaryAngles(cos=torch.cat((cos, cos), dim=2), signed_sin=torch.cat((-sin, sin), dim=2))
