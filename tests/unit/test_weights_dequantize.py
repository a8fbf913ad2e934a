"""Stored numbers become the float32 values that the format defines: the gguf package's own reader is the judge."""

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.common.model.ggml_types import BF16, F16, F32, GGML_TYPES, Q8_0
from services.worker.weights.dequantize import SUPPORTED_TYPES, dequantize
from tests.unit.ggml_blocks import random_blocks, stored_as


def some_rows(ggml_type: int) -> npt.NDArray[np.uint8]:
    """6 rows of 512 values: any bytes at all, but for numbers stored as floats, which are finite."""
    if ggml_type in (F32, F16, BF16):
        values = np.random.default_rng(ggml_type).normal(size=(6, 512)).astype(np.float32)
        return stored_as(values, gguf.GGMLQuantizationType(ggml_type))
    return random_blocks(ggml_type, 6, 512, seed=ggml_type, size=1)


@pytest.mark.parametrize("ggml_type", SUPPORTED_TYPES, ids=[GGML_TYPES[number].name for number in SUPPORTED_TYPES])
@pytest.mark.parametrize("offset", [0, 1, 34])
def test_values_are_exactly_those_of_the_format(ggml_type: int, offset: int) -> None:
    stored = some_rows(ggml_type)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(ggml_type))
    # At any place in a file: its alignment is not that of the numbers.
    data = torch.from_numpy(np.concatenate([np.zeros(offset, np.uint8), stored.reshape(-1)]))[offset:]
    out = torch.full((6, 512), float("nan"))
    dequantize(data, ggml_type, out)
    assert out.tolist() == expected.tolist()


def test_only_rows_of_a_larger_matrix_are_written() -> None:
    values = np.ones((2, 32), dtype=np.float32)
    whole = torch.zeros((4, 32))
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    dequantize(torch.from_numpy(stored.reshape(-1)), Q8_0, whole[1:3])
    assert whole.sum(dim=1).tolist() == pytest.approx([0, 32, 32, 0], rel=1e-2)


def test_the_types_that_are_read() -> None:
    names = {GGML_TYPES[ggml_type].name for ggml_type in SUPPORTED_TYPES}
    assert names == {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"}
