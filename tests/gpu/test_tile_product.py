"""Products in tiles: right, with SwiGLU, and for a row the same to the last bit whatever is beside it."""

import math

import pytest
import torch

from services.worker.kernels.rows import FP8, Rows, Scaled, round_rows
from services.worker.kernels.tile_product import (
    FEW_ROWS,
    MANY_ROWS,
    TileTuning,
    add_product,
    product_swiglu,
    product_swiglu_reference,
    tile_product,
    tile_product_reference,
)
from tests.gpu.devices import DEVICE, DTYPES, IS_CUDA, assert_near, random, seeded

# Rows, outputs, inputs: of whole tiles, and of none.
SHAPES = [(1, 6144, 4096), (300, 4096, 14336), (129, 576, 1536)] if IS_CUDA else [(1, 64, 64), (70, 144, 48)]
SMALL = TileTuning(64, 32, 64, 3, 4)
TUNINGS = [FEW_ROWS, MANY_ROWS] if IS_CUDA else [SMALL]


@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_rows_are_multiplied(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype, tuning: TileTuning
) -> None:
    if dtype == torch.float32 and tuning == MANY_ROWS:
        pytest.skip("float32 takes small tiles")
    generator = seeded(9)
    rows = random(generator, num_rows, num_inputs, dtype=dtype)
    weight = random(generator, num_outputs, num_inputs, dtype=dtype)
    out_dtype = torch.float32 if dtype == torch.float32 else DTYPES[1]
    out = torch.full((num_rows, num_outputs), math.nan, device=DEVICE, dtype=out_dtype)
    tile_product(rows, weight, out, tuning, pdl=IS_CUDA)
    assert_near(out, tile_product_reference(rows, weight), torch.bfloat16 if dtype == FP8 else out_dtype)


@pytest.mark.parametrize(("num_rows", "size", "num_inputs"), [(x, y // 2, z) for x, y, z in SHAPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_opens_where_it_is_multiplied(num_rows: int, size: int, num_inputs: int, dtype: torch.dtype) -> None:
    tuning = FEW_ROWS if dtype == torch.float32 and IS_CUDA else TUNINGS[-1]
    generator = seeded(3)
    rows = random(generator, num_rows, num_inputs, dtype=dtype)
    weight = (random(generator, 2 * size, num_inputs) / math.sqrt(num_inputs)).to(dtype)
    out = torch.full((num_rows, size), math.nan, device=DEVICE, dtype=dtype)
    product_swiglu(rows, weight, out, tuning, pdl=IS_CUDA)
    assert_near(out, product_swiglu_reference(rows, weight), dtype)


@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_a_product_is_added_once_to_what_is_there(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    tuning = FEW_ROWS if dtype == torch.float32 and IS_CUDA else TUNINGS[-1]
    generator = seeded(5)
    rows, weight = Rows(random(generator, num_rows, num_inputs)), random(generator, num_outputs, num_inputs)
    weight /= math.sqrt(num_inputs)
    kind = DTYPES[1] if dtype == FP8 else dtype
    channel_scales = None
    if dtype == FP8:
        rows, rounded = round_rows(rows.values), round_rows(weight)
        weight, channel_scales = rounded.values, rounded.scales
    else:
        rows, weight = Rows(rows.values.to(dtype)), weight.to(dtype)
    # Another row of it is nobody's.
    before = random(generator, num_rows + 1, num_outputs, dtype=kind)
    total = before.clone()
    add_product(rows, weight, channel_scales, total[:-1], tuning, pdl=IS_CUDA)
    product = Scaled(tile_product_reference(rows.values, weight), rows.scales, channel_scales).dequantized()
    assert_near(total[:-1], before[:-1].float() + product.to(kind).float(), kind)
    assert torch.equal(total[-1], before[-1])


@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_a_rows_product_is_the_same_to_the_last_bit_among_any_others(dtype: torch.dtype) -> None:
    num_outputs, num_inputs = (4096, 4096) if IS_CUDA else (72, 96)
    generator = seeded(4)
    rows = random(generator, 2500 if IS_CUDA else 100, num_inputs, dtype=dtype)
    weight = random(generator, num_outputs, num_inputs, dtype=dtype)

    out_dtype = torch.float32 if dtype == torch.float32 else DTYPES[1]

    def product_of(first: int, count: int) -> torch.Tensor:
        out = torch.empty((count, num_outputs), device=DEVICE, dtype=out_dtype)
        tile_product(rows[first : first + count].contiguous(), weight, out)
        return out

    alone = product_of(70, 1)
    for first, count in ((70, 2), (69, 17), (30, 64), (10, 65), (0, 100), (0, 300), (0, 2500)):
        if first + count <= len(rows):
            assert torch.equal(product_of(first, count)[70 - first], alone[0]), f"rows {first} to {first + count}"
