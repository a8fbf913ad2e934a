"""Which kernel multiplies follows docs/gpu.md, "Tunings"."""

import pytest
import torch

from services.worker.cuda.matrix import DeviceMatrix, Multiplier, to_fp8, tuning_for
from services.worker.kernels.rows import FP8, Rows, round_rows
from services.worker.weight_format import DeviceWeightFormat
from tests.gpu.devices import DEVICE, DTYPES, random, seeded

CPU = torch.device("cpu")


def a_shape(num_outputs: int, num_inputs: int) -> DeviceMatrix:
    """Of fp8, and without values."""
    values = torch.empty((num_outputs, num_inputs), dtype=FP8, device="meta")
    return DeviceMatrix(values, torch.empty(num_outputs, device="meta"))


@pytest.mark.parametrize(
    ("what", "num_outputs", "num_inputs", "is_rounded"),
    [
        ("qkv of an 8B", 6144, 4096, False),
        ("down of half an 8B", 4096, 7168, False),
        ("gate_up of an 8B", 28672, 4096, True),
        ("qkv of half a 70B", 5120, 8192, True),
        ("o of half a 70B", 8192, 4096, False),
        ("o of a 70B", 8192, 8192, True),
    ],
)
def test_one_row_is_rounded_to_fp8_for_matrices_of_many_weights(
    what: str, num_outputs: int, num_inputs: int, is_rounded: bool
) -> None:
    matrix = a_shape(num_outputs, num_inputs)
    assert Multiplier(1, CPU).wants_fp8(matrix, 1) is is_rounded, what
    assert Multiplier(1, CPU).wants_fp8(matrix, 2), "several rows always are"


def test_inputs_are_dealt_out_where_outputs_alone_leave_processors_idle() -> None:
    few, many = (a_shape(size, 14336).values for size in (4096, 8192))
    assert [tuning_for(1, weight, may_split=True).num_splits for weight in (few, many)] == [2, 1]  # type: ignore[union-attr]
    assert tuning_for(1, few, may_split=False).num_splits == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_a_long_product_is_added_to_the_residual_where_it_is_made(weights: DeviceWeightFormat) -> None:
    num_rows, num_outputs, num_inputs = 4096, 64, 32
    generator = seeded(8)
    values = random(generator, num_rows, num_inputs, dtype=DTYPES[1])
    weight = random(generator, num_outputs, num_inputs, dtype=DTYPES[1])
    residual = random(generator, num_rows, num_outputs, dtype=DTYPES[1])
    rows, matrix = (round_rows(values), to_fp8(weight)) if weights == "fp8" else (Rows(values), DeviceMatrix(weight))
    multiplier = Multiplier(1, DEVICE)
    assert multiplier.may_add(rows, matrix)
    assert not multiplier.may_add(rows.of(slice(4095)), matrix), "the norm's sum takes less than a kernel's begin"
    assert not Multiplier(1, DEVICE, is_batch_invariant=True).may_add(rows, matrix)
    expected = residual.float() + values.float() @ weight.float().T
    multiplier.add(rows, matrix, residual)
    error = float((residual.float() - expected).norm() / expected.norm())
    assert error < (0.06 if weights == "fp8" else 0.006)
