"""Numbers as GGUF files store them, for every type that is read; the `gguf` package says what they mean."""

from typing import Any
from zlib import crc32

import gguf
import numpy as np
import numpy.typing as npt
import torch

from services.common.model.ggml_types import GGML_TYPES, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0

# Where the scales lie in a block, as float16: (first byte, how many).
_SCALES = {Q4_0: (0, 1), Q4_1: (0, 2), Q8_0: (0, 1), Q4_K: (0, 2), Q6_K: (208, 1)}
_MADE_AT_RANDOM = (Q4_K, Q6_K)
"""Types that the package reads but does not write."""


def random_blocks(ggml_type: int, num_rows: int, num_columns: int, seed: int, size: float) -> npt.NDArray[np.uint8]:
    """Rows of any bytes at all, but for the scales, which are normal and of this size: [num_rows, row_bytes]."""
    rng = np.random.default_rng(seed)
    kind = GGML_TYPES[ggml_type]
    blocks = rng.integers(0, 256, (num_rows * num_columns // kind.block_elements, kind.block_bytes), dtype=np.uint8)
    first, num_scales = _SCALES[ggml_type]
    scales = (size * rng.normal(size=(len(blocks), num_scales))).astype(np.float16)
    blocks[:, first : first + 2 * num_scales] = scales.view(np.uint8)
    return blocks.reshape(num_rows, -1)


def stored_as(array: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Store a matrix, the same one always alike. Types that the package cannot write become random small numbers."""
    if kind in _MADE_AT_RANDOM:
        num_rows, num_columns = array.shape
        return random_blocks(kind, num_rows, num_columns, seed=crc32(array.tobytes()), size=3e-4)
    stored: npt.NDArray[np.uint8] = gguf.quants.quantize(array, kind).view(np.uint8)
    return stored


@torch.no_grad()
def round_matrices(model: Any, kind: gguf.GGMLQuantizationType) -> None:
    """Set a model's matrices to what is left of them when they are stored."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored_as(parameter.numpy(), kind), kind)))
