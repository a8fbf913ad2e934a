"""Which kernel multiplies follows docs/gpu-kernels.md, "Tunings"."""

from dataclasses import replace

import pytest
import torch

from services.worker.cuda.made_up_steps import ROWS_OF_FORMS
from services.worker.cuda.matrix import DeviceMatrix, Multiplier, PartsReader, swiglu_tuning_for, to_fp8, tuning_for
from services.worker.cuda.step_inputs import StepLayout
from services.worker.cuda.step_shapes import FilledUpTo, StepShapes, chunk_sizes, decode_sizes
from services.worker.kernels.decode_attention import tuning_for as attention_tuning_for
from services.worker.kernels.rows import FP8, Rows, round_rows
from services.worker.kernels.small_product import MOST_ROWS, row_blocks
from services.worker.weight_format import DeviceWeightFormat
from tests.gpu.devices import DEVICE, DTYPES, IS_CUDA, random, seeded

CPU = torch.device("cpu")
QKV, DOWN, GATE_UP = (
    torch.empty(shape, dtype=FP8, device="meta") for shape in ((6144, 4096), (4096, 14336), (28672, 4096))
)
"""Of an 8B."""


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
    assert Multiplier(1, 1, CPU).wants_fp8(matrix, 1) is is_rounded, what
    assert Multiplier(1, 1, CPU).wants_fp8(matrix, 2), "several rows always are"


def test_inputs_are_dealt_out_where_outputs_alone_leave_processors_idle() -> None:
    few, many = (a_shape(size, 14336).values for size in (4096, 8192))
    assert [tuning_for(1, weight, "norm").num_splits for weight in (few, many)] == [2, 1]  # type: ignore[union-attr]
    assert tuning_for(1, few).num_splits == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("num_rows", [1, 32, 64])
def test_inputs_that_cannot_be_dealt_out_are_multiplied_in_one_part(num_rows: int) -> None:
    # Of down: 18,944 are Qwen2.5-7B's, 14,336 + 256 nobody's. The largest copies are of 512 bytes, the others of 256.
    sevens, odd = (torch.empty((3584, size), dtype=FP8, device="meta") for size in (18944, 14336 + 256))
    splits = [tuning.num_splits if (tuning := tuning_for(num_rows, down, "norm")) else 0 for down in (sevens, odd)]
    assert splits == [2 if num_rows > 32 else 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_queries_keys_and_values_of_few_rows_come_in_parts_for_the_kernel_that_turns_them(dtype: torch.dtype) -> None:
    # An 8B's, half of them, and a 70B's.
    for shape in ((6144, 4096), (3072, 4096), (10240, 8192)):
        weight = torch.empty(shape, dtype=dtype, device="meta")
        assert [tuning_for(num_rows, weight, "rope").num_splits for num_rows in (2, 32, 33)] == [2, 2, 1]  # type: ignore[union-attr]
        assert tuning_for(96, weight, "rope") is None
    # Of many outputs, and of inputs that cannot be halved.
    for shape in ((28672, 4096), (6144, 4096 + 128)):
        weight = torch.empty(shape, dtype=dtype, device="meta")
        assert tuning_for(2, weight, "rope") == tuning_for(2, weight)


@pytest.mark.parametrize(
    ("num_rows", "deals_out", "activates"),
    [
        (64, True, True),
        (65, True, True),
        (128, True, True),
        (160, True, False),
        (192, True, True),
        (224, False, False),
        (256, False, True),
    ],
)
def test_in_bf16_an_8bs_few_rows_are_multiplied_by_our_kernel_where_it_is_faster(
    num_rows: int, deals_out: bool, activates: bool
) -> None:
    qkv, down, gate_up = (shape.to(torch.bfloat16) for shape in (QKV, DOWN, GATE_UP))
    assert bool(tuning_for(num_rows, down, "norm")) is deals_out
    assert bool(swiglu_tuning_for(num_rows, gate_up)) is activates
    assert bool(tuning_for(num_rows, qkv)) is (num_rows <= 64)


def test_in_fp8_an_8bs_gates_open_in_their_product_and_other_products_of_many_rows_are_cublas() -> None:
    assert [bool(swiglu_tuning_for(num_rows, GATE_UP)) for num_rows in (1, 2, 96, 160, 192)] == [0, 1, 1, 0, 1]
    assert [swiglu_tuning_for(num_rows, GATE_UP).input_bytes for num_rows in (2, 16, 17, 64)] == [128, 128, 256, 256]  # type: ignore[union-attr]
    assert all(tuning_for(65, weight, "norm") is None for weight in (QKV, DOWN, GATE_UP))


def forms(num_rows: int) -> set[object]:
    """What kernels of few rows are compiled for so many, of an 8B's matrices."""
    chosen: set[object] = set()
    for dtype in (torch.bfloat16, FP8):
        for shape in (QKV, DOWN, GATE_UP):
            weight = shape.to(dtype)
            products = [tuning_for(num_rows, weight, reader) for reader in (None, "norm", "rope")]
            tunings = (*products, swiglu_tuning_for(num_rows, weight))
            chosen |= {(dtype, row_blocks(num_rows), *which) for which in enumerate(tunings) if which[1]}
        turned = tuning_for(num_rows, QKV.to(dtype), "rope")
        chosen.add((dtype, "turned from so many parts", turned.num_splits if turned else 1))
    return chosen


def test_all_forms_of_few_rows_are_compiled_for_steps_that_are_computed_as_they_are() -> None:
    needed = set().union(*map(forms, range(2, MOST_ROWS + 1)))
    assert set().union(*map(forms, ROWS_OF_FORMS)) == needed


@pytest.mark.parametrize("max_sequences", [5, 17, 20, 31, 33, 65, 100, 129, 250, 512])
def test_all_forms_of_few_rows_are_compiled_before_a_worker_serves(max_sequences: int) -> None:
    filled_up_to = FilledUpTo(decode_sizes(max_sequences), chunk_sizes(8192 + max_sequences))
    shapes = StepShapes(filled_up_to, StepLayout(8192, 64, False, True, False, 16), may_share=False).forms()
    for has_chunks in (False, True):
        sizes = filled_up_to.chunks if has_chunks else filled_up_to.decodes[1:]
        rehearsed = [shape.num_rows for shape in shapes if shape.has_chunks == has_chunks]
        assert set().union(*map(forms, rehearsed)) == set().union(*map(forms, sizes))
    alone = [shape.num_rows for shape in shapes if not shape.has_chunks]
    for is_fp8 in (False, True):
        compiled, used = (
            {replace(attention_tuning_for(number, is_fp8), more_pieces=0) for number in numbers}
            for numbers in (alone, filled_up_to.decodes)
        )
        assert compiled == used


@pytest.mark.parametrize("parts_for", ["norm", "rope"])
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("num_rows", [2, 32, 48, 64, 65, 96, 128, 160, 192, 200, 256] if IS_CUDA else [2, 65])
def test_rows_are_multiplied_whichever_kernel_is_faster(
    num_rows: int, weights: DeviceWeightFormat, parts_for: PartsReader
) -> None:
    num_outputs, num_inputs = (1024, 4096) if IS_CUDA else (64, 32)
    generator = seeded(num_rows)
    values = random(generator, num_rows, num_inputs, dtype=DTYPES[1])
    weight = random(generator, num_outputs, num_inputs, dtype=DTYPES[1])
    rows, matrix = (round_rows(values), to_fp8(weight)) if weights == "fp8" else (Rows(values), DeviceMatrix(weight))
    expected = rows.dequantized() @ weight.float().T
    # What is to be scaled is beyond float16.
    dtype = DTYPES[1] if IS_CUDA or weights == "bf16" else torch.float32
    out = torch.empty((num_rows, num_outputs), dtype=dtype, device=DEVICE)
    # Room for the parts of one reader.
    multiplier = Multiplier(*((num_outputs, 0) if parts_for == "norm" else (0, num_outputs)), DEVICE)
    product = multiplier(rows, matrix, out, parts_for=parts_for, pdl=IS_CUDA)
    if parts_for == "rope":
        assert product.num_parts == (2 if IS_CUDA and num_rows <= 32 else 1)
    error = float((product.dequantized() - expected).norm() / expected.norm())
    assert error < (0.06 if weights == "fp8" else 0.006)


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_a_long_product_is_added_to_the_residual_where_it_is_made(weights: DeviceWeightFormat) -> None:
    num_rows, num_outputs, num_inputs = 4096, 64, 32
    generator = seeded(8)
    values = random(generator, num_rows, num_inputs, dtype=DTYPES[1])
    weight = random(generator, num_outputs, num_inputs, dtype=DTYPES[1])
    residual = random(generator, num_rows, num_outputs, dtype=DTYPES[1])
    rows, matrix = (round_rows(values), to_fp8(weight)) if weights == "fp8" else (Rows(values), DeviceMatrix(weight))
    multiplier = Multiplier(1, 1, DEVICE)
    assert multiplier.may_add(rows, matrix)
    assert not multiplier.may_add(rows.of(slice(4095)), matrix), "the norm's sum takes less than a kernel's begin"
    assert not Multiplier(1, 1, DEVICE, is_batch_invariant=True).may_add(rows, matrix)
    expected = residual.float() + values.float() @ weight.float().T
    multiplier.add(rows, matrix, residual)
    error = float((residual.float() - expected).norm() / expected.norm())
    assert error < (0.06 if weights == "fp8" else 0.006)
