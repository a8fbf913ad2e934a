"""How fast the rotary embedding turns each pair of a head's dimensions, in radians a position."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's way to a longer context: slow pairs turn `factor` times slower, fast ones as before.

    A pair is slow if it turns less than `low_frequency_factor` times over `original_context_tokens`, fast if more than
    `high_frequency_factor` times. Between, the two are mixed.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_tokens: int


def rotary_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> Tensor:
    """Return the frequencies of all pairs, [head_dim / 2] float32: theta^(-2i / head_dim) for pair i, then scaled.

    In float32 and in the order of operations of transformers (`_compute_llama3_parameters`): at a position of 100,000,
    another rounding would turn a pair by some hundredths of a radian.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return frequencies if scaling is None else _scaled(frequencies, scaling)


def _scaled(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    context, low, high = scaling.original_context_tokens, scaling.low_frequency_factor, scaling.high_frequency_factor
    wavelengths = 2 * math.pi / frequencies
    is_slow, is_fast = wavelengths > context / low, wavelengths < context / high
    slowed = torch.where(is_slow, frequencies / scaling.factor, frequencies)
    share = (context / wavelengths - low) / (high - low)
    mixed = (1 - share) * slowed / scaling.factor + share * slowed
    return torch.where(is_slow | is_fast, slowed, mixed)
