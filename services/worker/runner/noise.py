"""Noise for sampling, by hashing instead of drawing: no generator's state, no order of draws."""

from torch import Tensor

_MASK_64 = (1 << 64) - 1
# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the increment and the finalizer's shifts and factors.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_UNIFORM_BITS = 52


def noise_key(seed: int, choice: int, index: int) -> int:
    """Return what the noise of one token to sample depends on, beside the candidates, as an int64."""
    return _as_int64(_mix(_mix(_mix(seed) + choice) + index))


def gumbel_noise(key: int | Tensor, token_ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, float64, of candidates, `token_ids` (int64).

    A value depends on the key and the candidate's token id alone. Keys, int64, may be of a shape to be broadcast.
    """
    bits = _mix_tensor((token_ids + 1) * _as_int64(_INCREMENT) + key)
    # The middle of one of 2^52 equal parts of (0, 1): never 0 or 1, whose logarithms would be infinite or 0.
    uniform = (_shift_right(bits, 64 - _UNIFORM_BITS).double() + 0.5) * 2.0**-_UNIFORM_BITS
    return uniform.log_().neg_().log_().neg_()


def _mix(value: int) -> int:
    value = (value + _INCREMENT) & _MASK_64
    for shift, factor in _ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK_64
    return value ^ (value >> _LAST_SHIFT)


def _mix_tensor(values: Tensor) -> Tensor:
    """`_mix` without its first addition. int64 arithmetic wraps, which is arithmetic modulo 2^64."""
    for shift, factor in _ROUNDS:
        values = (values ^ _shift_right(values, shift)) * _as_int64(factor)
    return values ^ _shift_right(values, _LAST_SHIFT)


def _shift_right(values: Tensor, num_bits: int) -> Tensor:
    """Shift zeros in from the left: int64's own shift repeats the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
