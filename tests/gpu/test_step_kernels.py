"""The kernels around a layer's products give what their references give."""

import math

import pytest
import torch
from torch import Tensor

from services.worker.kernels.choose_token import (
    Draws,
    choose_likeliest,
    choose_likeliest_reference,
    draw_tokens,
    draw_tokens_reference,
    part_results,
)
from services.worker.kernels.embedding import embed, embed_reference
from services.worker.kernels.gemv import gemv, gemv_reference, gemv_swiglu, gemv_swiglu_reference
from services.worker.kernels.gemv_rope import gemv_rope, gemv_rope_reference
from services.worker.kernels.norm import add_rms_norm, add_rms_norm_reference
from services.worker.kernels.paged_kv import PagedLayer
from services.worker.kernels.rope_kv import HeadWeights, rope_and_write, rope_and_write_reference
from services.worker.kernels.round_rows import round_rows_into
from services.worker.kernels.rows import FP8, Rows, Scaled, round_rows
from services.worker.kernels.small_product import (
    ProductTuning,
    small_product,
    small_product_reference,
    small_product_swiglu,
)
from services.worker.kernels.swiglu import swiglu, swiglu_reference
from services.worker.runner.noise import noise_key
from services.worker.runner.rope import rotary_table
from tests.gpu.devices import DEVICE, DTYPES, IS_CUDA, assert_near, random, seeded

# The interpreter rounds 1.97 up to 1: it loses the carry.
FP8_ERROR = 0.03 if IS_CUDA else 0.1
SHAPES = [(1, 4096), (37, 576), (256, 14336)] if IS_CUDA else [(1, 48), (5, 576)]


def a_product(num_rows: int, size: int, dtype: torch.dtype, *, has_scales: bool, seed: int = 3) -> Scaled:
    """Rows that a product gave, of other sizes than they stand for if it was one of fp8."""
    generator = seeded(seed)
    product = random(generator, num_rows, size)
    if not has_scales:
        return Scaled(product.to(dtype))
    row_scales = random(generator, num_rows).abs() + 0.3
    channel_scales = random(generator, size).abs() * 0.1 + 0.01
    return Scaled((product / row_scales[:, None] / channel_scales).to(dtype), row_scales, channel_scales)


def in_parts(given: Scaled, num_parts: int) -> Scaled:
    """The same product, to be added up."""
    product = given.product.float()
    parts = random(seeded(4), num_parts - 1, *product.shape)
    return Scaled(torch.cat((parts, (product - parts.sum(dim=0))[None])), given.row_scales, given.channel_scales)


def rows_like(num_rows: int, size: int, dtype: torch.dtype, *, to_fp8: bool) -> Rows:
    """Room that holds NaN."""
    values = torch.full((num_rows, size), math.nan, device=DEVICE).to(FP8 if to_fp8 else dtype)
    return Rows(values, torch.full((num_rows,), math.nan, device=DEVICE) if to_fp8 else None)


def assert_rows_near(actual: Rows, expected: Rows, dtype: torch.dtype) -> None:
    if expected.scales is not None:
        assert actual.scales is not None
        assert_near(actual.scales, expected.scales, DTYPES[1])
        # A value at the border of two fp8 values may fall to either side: rarely, and by one step.
        is_same = actual.values.float() == expected.values.float()
        assert float(is_same.float().mean()) > 0.95
        assert float((actual.dequantized() - expected.dequantized()).norm() / expected.dequantized().norm()) < FP8_ERROR
    else:
        assert_near(actual.values, expected.values, dtype)


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("delta", "to_fp8"), [("none", False), ("plain", False), ("scaled", True), ("plain", True)])
def test_a_residual_is_added_and_normed(num_rows: int, size: int, dtype: torch.dtype, delta: str, to_fp8: bool) -> None:
    added = None if delta == "none" else a_product(num_rows, size, dtype, has_scales=delta == "scaled")
    generator = seeded(1)
    residual = random(generator, num_rows, size, dtype=dtype)
    weight = random(generator, size, dtype=dtype)
    new_residual, expected = add_rms_norm_reference(added, residual, weight, 1e-5, to_fp8)
    out = rows_like(num_rows, size, dtype, to_fp8=to_fp8)
    add_rms_norm(added, residual, weight, 1e-5, out)
    assert_near(residual, new_residual)
    assert_rows_near(out, expected, dtype)


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_scales", "to_fp8"), [(False, False), (True, True), (False, True), (True, False)])
def test_a_gate_opens(num_rows: int, size: int, dtype: torch.dtype, has_scales: bool, to_fp8: bool) -> None:
    gate_up = a_product(num_rows, 2 * size, dtype, has_scales=has_scales)
    out = rows_like(num_rows, size, dtype, to_fp8=to_fp8)
    swiglu(gate_up, out)
    assert_rows_near(out, swiglu_reference(gate_up, to_fp8), dtype)


def test_the_scales_that_are_written_may_be_those_that_are_read() -> None:
    gate_up = a_product(5, 2 * 300, DTYPES[1], has_scales=True)
    expected = swiglu_reference(gate_up, True)
    out = Rows(rows_like(5, 300, DTYPES[1], to_fp8=True).values, gate_up.row_scales)
    swiglu(gate_up, out)
    assert_rows_near(out, expected, DTYPES[1])


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_rows_are_rounded_by_their_largest_value(num_rows: int, size: int) -> None:
    values = random(seeded(2), num_rows, size, dtype=DTYPES[1])
    out = rows_like(num_rows, size, DTYPES[1], to_fp8=True)
    round_rows_into(values, out)
    assert_rows_near(out, round_rows(values), DTYPES[1])
    round_rows_into(torch.zeros_like(values), out)
    assert (out.dequantized() == 0).all()


def test_a_token_that_only_the_device_knows_is_embedded() -> None:
    embedding = random(seeded(1), 50, 72)
    token_ids = torch.tensor([7, -1, 49, -1], dtype=torch.int32, device=DEVICE)
    places = torch.tensor([0, 2, 0, 1], dtype=torch.int32, device=DEVICE)
    last_tokens = torch.tensor([9, 11, 13], dtype=torch.int32, device=DEVICE)
    out = torch.full((4, 72), math.nan, device=DEVICE)
    embed(token_ids, places, last_tokens, embedding, out)
    assert torch.equal(out, embedding[torch.tensor([7, 13, 49, 11], device=DEVICE)])
    assert torch.equal(out, embed_reference(token_ids, places, last_tokens, embedding))


def test_of_a_token_that_is_in_another_ranks_part_the_row_is_zeros() -> None:
    part = random(seeded(1), 20, 72)
    token_ids = torch.tensor([10, 29, 9, 30, -1], dtype=torch.int32, device=DEVICE)
    places = torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32, device=DEVICE)
    last_tokens = torch.tensor([9, 11], dtype=torch.int32, device=DEVICE)
    out, cleared = torch.full((2, 5, 72), math.nan, device=DEVICE)
    embed(token_ids, places, last_tokens, part, out, 10, cleared)
    assert torch.equal(out, embed_reference(token_ids, places, last_tokens, part, 10))
    zeros = torch.zeros(72, device=DEVICE)
    assert torch.equal(out, torch.stack((part[0], part[19], zeros, zeros, part[1])))
    assert (cleared == 0).all()


# Query heads, key heads, length of a head.
HEADS = [(32, 8, 128), (9, 3, 64), (5, 1, 20)] if IS_CUDA else [(4, 2, 16), (9, 3, 20)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("has_scales", "has_bias", "has_norm", "kv_dtype", "num_parts"),
    [
        (False, False, False, None, 1),
        (True, True, True, FP8, 1),
        (False, True, False, None, 1),
        (True, False, True, None, 1),
        (False, False, False, None, 2),
        (True, True, True, FP8, 2),
        (True, False, False, None, 4),
    ],
)
def test_queries_are_turned_and_keys_and_values_written(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    has_scales: bool,
    has_bias: bool,
    has_norm: bool,
    kv_dtype: torch.dtype | None,
    num_parts: int,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = seeded(5)
    num_tokens, num_blocks, block_size = 5, 4, 16
    size = (num_heads + 2 * num_kv_heads) * head_dim
    weights = HeadWeights(
        rotary_table(300, torch.rand(head_dim // 2, generator=generator)).to(DEVICE),
        random(generator, size) if has_bias else None,
        random(generator, num_heads + num_kv_heads, head_dim) if has_norm else None,
        1e-6,
    )
    qkv = a_product(num_tokens, size, dtype, has_scales=has_scales)
    if num_parts > 1:
        qkv = in_parts(qkv, num_parts)
    positions = torch.tensor([0, 1, 299, 7, 8], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([5, 63, -1, 16, 17], dtype=torch.int32, device=DEVICE)
    shape = (num_blocks, 2, num_kv_heads, block_size, head_dim)
    kv = random(generator, *shape).to(kv_dtype or dtype)
    expected_kv = kv.clone()
    queries = torch.full((num_tokens, num_heads, head_dim), math.nan, device=DEVICE).to(dtype)
    rope_and_write(qkv, weights, positions, slots, PagedLayer(kv), queries)
    expected = rope_and_write_reference(qkv, weights, positions, slots, PagedLayer(expected_kv))
    assert_near(queries, expected.to(dtype))
    difference = (kv.float() - expected_kv.float()).norm() / expected_kv.float().norm()
    assert float(difference) < (0.04 if kv_dtype else 1e-5 if dtype == torch.float32 else 2e-3)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool, device=DEVICE)
    untouched[slots[slots >= 0].long()] = False

    def by_slot(x: Tensor) -> Tensor:
        return x.float().permute(0, 3, 1, 2, 4).reshape(num_blocks * block_size, -1)

    assert torch.equal(by_slot(kv)[untouched], by_slot(expected_kv)[untouched])

    if num_parts > 1:
        with pytest.raises(AssertionError):
            rope_and_write(qkv, weights, positions, slots, PagedLayer(kv), queries, keeps_dense=True)
        return
    rope_and_write(qkv, weights, positions, slots, PagedLayer(kv), queries, keeps_dense=True)
    dense = qkv.product.view(num_tokens, -1, head_dim)[slots >= 0, num_heads:].float()
    cached = by_slot(expected_kv).view(num_blocks * block_size, -1, head_dim)[slots[slots >= 0].long()]
    assert float((dense - cached).norm() / cached.norm()) < (0.04 if kv_dtype else 2e-3)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("weight_dtype", [*DTYPES, FP8])
@pytest.mark.parametrize(
    ("slot", "has_bias", "has_fp8_cache"), [(37, False, False), (-1, True, False), (16, True, True)]
)
def test_one_row_is_multiplied_and_its_heads_turned_and_written(
    heads: tuple[int, int, int], weight_dtype: torch.dtype, slot: int, has_bias: bool, has_fp8_cache: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    dtype = DTYPES[1] if weight_dtype == FP8 else weight_dtype
    generator = seeded(6)
    num_inputs, num_outputs = 4096 if IS_CUDA else 72, (num_heads + 2 * num_kv_heads) * head_dim
    weights = HeadWeights(
        rotary_table(300, torch.rand(head_dim // 2, generator=generator)).to(DEVICE),
        random(generator, num_outputs) if has_bias else None,
    )
    row = random(generator, 1, num_inputs, dtype=dtype)
    weight = (random(generator, num_outputs, num_inputs) / 64).to(weight_dtype)
    scales = random(generator, num_outputs).abs() if weight_dtype == FP8 else None
    position = torch.tensor([299], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([slot], dtype=torch.int32, device=DEVICE)
    kv = random(generator, 4, 2, num_kv_heads, 16, head_dim).to(FP8 if has_fp8_cache else dtype)
    expected_kv = kv.clone()
    queries = torch.full((1, num_heads, head_dim), math.nan, device=DEVICE).to(dtype)
    gemv_rope(row, weight, scales, weights, position, slots, PagedLayer(kv), queries)
    expected = gemv_rope_reference(row, weight, scales, weights, position, slots, PagedLayer(expected_kv))
    assert_near(queries, expected)
    difference = (kv.float() - expected_kv.float()).norm() / expected_kv.float().norm()
    assert float(difference) < (0.04 if has_fp8_cache else 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(130, 4096), (64, 14336)] if IS_CUDA else [(7, 48), (3, 130)])
@pytest.mark.parametrize("weight_dtype", [*DTYPES, FP8])
def test_one_row_is_multiplied(num_outputs: int, num_inputs: int, weight_dtype: torch.dtype) -> None:
    dtype = DTYPES[1] if weight_dtype == FP8 else weight_dtype
    generator = seeded(4)
    row = random(generator, 1, num_inputs, dtype=dtype)
    weight = random(generator, num_outputs, num_inputs, dtype=weight_dtype)
    scales = random(generator, num_outputs).abs() if weight_dtype == FP8 else None
    out = torch.full((1, num_outputs), math.nan, device=DEVICE).to(dtype)
    gemv(row, weight, scales, out)
    assert_near(out, gemv_reference(row, weight, scales))
    halves = weight[: num_outputs // 2 * 2]
    out = torch.full((1, num_outputs // 2), math.nan, device=DEVICE).to(dtype)
    scales = None if scales is None else scales[: len(halves)]
    gemv_swiglu(row, halves, scales, out)
    assert_near(out, gemv_swiglu_reference(row, halves, scales))


# Of each form: one block of rows, and two, also of rows that are not all there.
FEW_ROWS = [2, 16, 33, 64, 65, 96, 128, 130, 192, 256] if IS_CUDA else [2, 17, 40, 65]


def few_rows(generator: torch.Generator, num_rows: int, size: int, dtype: torch.dtype, *, have_others: bool) -> Tensor:
    """Rows, behind which in memory are others, as in a step's room, or nothing."""
    rows = random(generator, num_rows, size, dtype=dtype)
    if not have_others:
        return rows
    others = torch.full((300, size), math.nan, device=DEVICE).to(dtype)
    return torch.cat([rows, others])[:num_rows]


@pytest.mark.parametrize("have_others", [False, True])
@pytest.mark.parametrize("num_rows", FEW_ROWS)
@pytest.mark.parametrize("dtype", [DTYPES[1], FP8])
@pytest.mark.parametrize(("outputs", "num_splits"), [(64, 1), (128, 1), (64, 2)])
def test_few_rows_are_multiplied_and_their_parts_added_by_the_norm(
    num_rows: int, dtype: torch.dtype, outputs: int, num_splits: int, have_others: bool
) -> None:
    num_outputs, num_inputs = (4096, 14336) if IS_CUDA else (128, 512)
    tuning = ProductTuning(outputs, 128, 4, num_warps=8 if num_rows > 64 else 4, num_splits=num_splits)
    generator = seeded(9)
    rows = few_rows(generator, num_rows, num_inputs, dtype, have_others=have_others)
    weight = random(generator, num_outputs, num_inputs, dtype=dtype)
    out = torch.full((num_splits, num_rows + 1, num_outputs), math.nan, device=DEVICE).flatten()
    out, behind = out[: num_splits * num_rows * num_outputs], out[num_splits * num_rows * num_outputs :]
    out = out.view(num_splits, num_rows, num_outputs)
    small_product(rows, weight, out, tuning, pdl=IS_CUDA)
    expected = small_product_reference(rows, weight, num_splits)
    assert_near(out, expected, DTYPES[1] if dtype != FP8 else torch.bfloat16)
    assert behind.isnan().all()

    residual = torch.zeros((num_rows, num_outputs), device=DEVICE)
    normed = rows_like(num_rows, num_outputs, torch.float32, to_fp8=False)
    add_rms_norm(Scaled(out), residual, torch.ones(num_outputs, device=DEVICE), 1e-5, normed)
    assert_near(residual, expected.sum(dim=0), torch.bfloat16)


@pytest.mark.parametrize("num_rows", FEW_ROWS)
@pytest.mark.parametrize("dtype", [DTYPES[1], FP8])
@pytest.mark.parametrize("outputs", [128, 256] if IS_CUDA else [128])
def test_a_gate_opens_where_few_rows_are_multiplied(num_rows: int, dtype: torch.dtype, outputs: int) -> None:
    size, num_inputs = (2048, 4096) if IS_CUDA else (128, 256)
    generator = seeded(5)
    rows = Rows(few_rows(generator, num_rows, num_inputs, dtype, have_others=True))
    weight, channel_scales = random(generator, 2 * size, num_inputs) / math.sqrt(num_inputs), None
    if dtype == FP8:
        rounded = round_rows(weight)
        weight, channel_scales = rounded.values, rounded.scales
        rows = Rows(rows.values, random(generator, num_rows).abs())
    else:
        weight = weight.to(dtype)
    out = torch.full((num_rows + 1, size), math.nan, device=DEVICE).to(DTYPES[1])
    tuning = ProductTuning(outputs, 128, 3, num_warps=8)
    small_product_swiglu(rows, weight, channel_scales, out[:-1], tuning, pdl=IS_CUDA)
    product = Scaled(rows.values.float() @ weight.float().T, rows.scales, channel_scales)
    assert_near(out[:-1], swiglu_reference(product, to_fp8=False).values, DTYPES[1])
    assert out[-1].isnan().all()


VOCABULARY = 128256 if IS_CUDA else 5000


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_token_is_chosen_and_kept_for_the_next_step(dtype: torch.dtype) -> None:
    logits = random(seeded(6), 4, VOCABULARY, dtype=dtype)
    # Of equal ones the first.
    logits[1, VOCABULARY - 3] = logits[1, 70] = 50.0
    places = torch.tensor([2, 0, -1, 1], dtype=torch.int32, device=DEVICE)
    tokens = torch.full((4,), -7, dtype=torch.int32, device=DEVICE)
    last_tokens = torch.full((3,), -7, dtype=torch.int32, device=DEVICE)
    room = part_results(4, VOCABULARY, DEVICE)
    choose_likeliest(logits, room, places, tokens, last_tokens)
    assert torch.equal(tokens, choose_likeliest_reference(logits))
    assert int(tokens[1]) == 70
    assert last_tokens.tolist() == tokens[[1, 3, 0]].tolist()
    assert torch.equal(room.largest, logits.float().amax(dim=1))


def test_tokens_are_drawn_with_the_cpu_runners_noise() -> None:
    logits = random(seeded(6), 3, VOCABULARY) * 2
    keys = [noise_key(seed, choice, index) for seed, choice, index in ((1, 0, 0), ((1 << 63) + 5, 3, 700))]
    draws = Draws(
        torch.tensor([2, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor(keys, device=DEVICE),
        torch.tensor([1.0, 0.7], device=DEVICE),
    )
    places = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    tokens = torch.full((3,), -7, dtype=torch.int32, device=DEVICE)
    last_tokens = torch.full((3,), -7, dtype=torch.int32, device=DEVICE)
    room = part_results(3, VOCABULARY, DEVICE)
    choose_likeliest(logits, room, places, tokens, last_tokens)
    draw_tokens(logits, draws, room, places, tokens, last_tokens)
    drawn = draw_tokens_reference(logits, draws).tolist()
    assert tokens.tolist() == [drawn[1], int(logits[1].argmax()), drawn[0]]
    assert last_tokens.tolist() == tokens.tolist()
