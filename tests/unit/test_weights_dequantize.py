"""Stored numbers become the float32 values that the format defines: the gguf package's own reader is the judge."""

import gguf
import numpy as np
import pytest
import torch

from services.common.model.ggml_types import F16, F32, GGML_TYPES, Q4_1, Q8_0
from services.worker.weights.dequantize import SUPPORTED_TYPES, dequantize


@pytest.mark.parametrize("ggml_type", [F32, F16, Q4_1, Q8_0])
@pytest.mark.parametrize("offset", [0, 1, 34])
def test_values_are_exactly_those_of_the_format(ggml_type: int, offset: int) -> None:
    kind = gguf.GGMLQuantizationType(ggml_type)
    values = np.random.default_rng(ggml_type).normal(size=(6, 64)).astype(np.float32)
    stored = gguf.quants.quantize(values, kind)
    expected = gguf.quants.dequantize(stored, kind)
    # At any place in a file: its alignment is not that of the numbers.
    data = torch.from_numpy(np.concatenate([np.zeros(offset, np.uint8), stored.reshape(-1).view(np.uint8)]))[offset:]
    out = torch.full((6, 64), float("nan"))
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
