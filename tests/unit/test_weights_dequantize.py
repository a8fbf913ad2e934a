"""Stored numbers become the float32 values that the format defines: the gguf package's own reader is the judge."""

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.common.model.ggml_types import BF16, F16, F32, GGML_TYPES, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0
from services.worker.weights.dequantize import SUPPORTED_TYPES, dequantize

# Where the scales lie in a block, as float16: (first byte, how many).
SCALES = {Q4_0: (0, 1), Q4_1: (0, 2), Q8_0: (0, 1), Q4_K: (0, 2), Q6_K: (208, 1)}


def random_blocks(ggml_type: int, num_values: int) -> npt.NDArray[np.uint8]:
    """Any bytes at all, but for numbers stored as floats, which are finite."""
    rng = np.random.default_rng(ggml_type)
    kind = GGML_TYPES[ggml_type]
    if ggml_type in (F32, F16, BF16):
        values = rng.normal(size=(1, num_values)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType(ggml_type)).view(np.uint8).reshape(-1)
    blocks = rng.integers(0, 256, (num_values // kind.block_elements, kind.block_bytes), dtype=np.uint8)
    first, num_scales = SCALES[ggml_type]
    scales = rng.normal(size=(len(blocks), num_scales)).astype(np.float16)
    blocks[:, first : first + 2 * num_scales] = scales.view(np.uint8)
    return blocks.reshape(-1)


@pytest.mark.parametrize("ggml_type", SUPPORTED_TYPES, ids=[GGML_TYPES[number].name for number in SUPPORTED_TYPES])
@pytest.mark.parametrize("offset", [0, 1, 34])
def test_values_are_exactly_those_of_the_format(ggml_type: int, offset: int) -> None:
    stored = random_blocks(ggml_type, 6 * 512)
    expected = gguf.quants.dequantize(stored.reshape(6, -1), gguf.GGMLQuantizationType(ggml_type))
    # At any place in a file: its alignment is not that of the numbers.
    data = torch.from_numpy(np.concatenate([np.zeros(offset, np.uint8), stored]))[offset:]
    out = torch.full((6, 512), float("nan"))
    dequantize(data, ggml_type, out)
    assert out.tolist() == expected.tolist()


def test_only_rows_of_a_larger_matrix_are_written() -> None:
    values = np.ones((2, 32), dtype=np.float32)
    whole = torch.zeros((4, 32))
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    dequantize(torch.from_numpy(stored.reshape(-1)), Q8_0, whole[1:3])
    assert whole.sum(dim=1).tolist() == pytest.approx([0, 32, 32, 0], rel=1e-2)


def test_every_supported_type_has_a_known_layout() -> None:
    assert set(SUPPORTED_TYPES) <= set(GGML_TYPES)
