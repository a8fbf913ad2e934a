"""What steps are filled up to: few sizes, and in each of them room for every step that is."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.cuda.step_inputs import StepInputs, StepLayout, chunk_tiles, fill, views
from services.worker.cuda.step_shapes import (
    MOST_CHUNKS,
    FilledUpTo,
    StepShape,
    StepShapes,
    chunk_sizes,
    decode_sizes,
)
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk

BLOCK = 64
MOST_SEQUENCES, MOST_ROWS = 100, 1100


def a_chunk(number: int, first_position: int, num_tokens: int, sample_index: int | None = 0) -> SequenceChunk:
    blocks = tuple(BlockId(number) for _ in range(-(-(first_position + num_tokens) // BLOCK)))
    return SequenceChunk(
        SequenceId(number), (1,) * num_tokens, first_position, blocks, SamplingParameters(), sample_index
    )


def a_layout(*, is_batch_invariant: bool = False) -> StepLayout:
    return StepLayout(4096, BLOCK, False, not is_batch_invariant, is_batch_invariant, tile_tokens=16)


def shapes(layout: StepLayout) -> StepShapes:
    filled_up_to = FilledUpTo(decode_sizes(MOST_SEQUENCES), chunk_sizes(MOST_ROWS))
    return StepShapes(filled_up_to, layout, may_share=True)


def test_of_decodes_at_most_6_percent_are_for_nothing() -> None:
    sizes = decode_sizes(1500)
    assert sizes[0] == 1
    assert sizes[-1] == 1500
    assert all(0 <= (after - before - 1) / after <= 0.06 for before, after in pairwise(sizes))


def test_as_many_decodes_as_are_common_have_a_size_of_their_own() -> None:
    assert {1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024} <= set(decode_sizes(1200))
    assert decode_sizes(5) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("most", [2304, 8704, 1100, 20])
def test_of_some_hundred_rows_with_prompts_less_than_a_quarter_is_for_nothing(most: int) -> None:
    sizes = chunk_sizes(most)
    assert sizes[-1] == min(most, 2304)
    assert list(sizes) == sorted(set(sizes))
    assert all((after - before - 1) / (before + 1) < 1 / 4 for before, after in pairwise(sizes) if before >= 128)


def test_a_step_that_is_as_large_as_a_size_is_filled_up_to_no_larger_one() -> None:
    of = shapes(a_layout()).of
    for size in decode_sizes(MOST_SEQUENCES):
        shape = of([a_chunk(number, 700, 1, 5) for number in range(size)], shares=False)
        assert shape
        assert shape.num_rows == size
    for size in chunk_sizes(MOST_ROWS):
        shape = of([a_chunk(0, 700, 1, 5), a_chunk(1, 0, size - 1)], shares=False)
        assert shape
        assert shape.num_rows == size


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    decodes=st.lists(st.integers(1, 4000), max_size=MOST_SEQUENCES),
    prompts=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 700)), max_size=20),
    is_batch_invariant=st.booleans(),
)
def test_a_step_is_filled_up_to_a_shape_with_room_for_it_or_not_at_all(
    decodes: list[int], prompts: list[tuple[int, int]], is_batch_invariant: bool
) -> None:
    layout = a_layout(is_batch_invariant=is_batch_invariant)
    chunks = [a_chunk(number, context, 1, 5) for number, context in enumerate(decodes)]
    chunks += [a_chunk(1000 + number, *chunk) for number, chunk in enumerate(prompts)]
    num_rows = sum(len(chunk.token_ids) for chunk in chunks)
    shape = shapes(layout).of(chunks, shares=False)
    if num_rows > MOST_ROWS or len(prompts) > MOST_CHUNKS + is_batch_invariant:
        return
    if shape is None:
        assert not chunks or len(chunks) > MOST_SEQUENCES
        return
    num_decodes = layout.num_decodes(chunks)
    sizes = shape.sizes(layout, len(chunks))
    numbers = np.full(sizes.num_numbers, 77, dtype=np.int32)
    inputs = views(numbers, sizes)
    places = np.arange(len(chunks), dtype=np.int32)
    tables = np.zeros((len(chunks), layout.table_blocks), dtype=np.int32)
    tiles = chunk_tiles(chunks, num_decodes, layout.tile_tokens, leaves_dense=False) if shape.has_chunks else None
    fill(inputs, chunks, places, tables, tiles, (), layout)
    attended = sorted(inputs.pieces[inputs.pieces[:, 0] >= 0, 0].tolist())
    assert sorted({*attended}) == list(range(num_decodes))
    for first_row, num_queries, _, _ in inputs.tiles.tolist():
        attended += range(first_row, first_row + num_queries)
    assert sorted({*attended}) == list(range(num_rows))
    assert (inputs.slots[:num_rows] >= 0).all()
    assert (inputs.slots[num_rows:] == -1).all()


def test_what_has_no_shape_is_computed_as_it_is() -> None:
    layout = a_layout()
    prompt = a_chunk(1, 0, 40)
    assert shapes(layout).of([prompt], shares=False) == StepShape(64, 64, has_chunks=True)
    assert shapes(layout).of([prompt._replace(scored_token_ids=(1,))], shares=False) is None
    assert shapes(layout).of([a_chunk(1, 0, MOST_ROWS + 1)], shares=False) is None
    assert shapes(layout).of([a_chunk(number, 0, 2) for number in range(MOST_CHUNKS + 1)], shares=False) is None
    assert StepShapes(FilledUpTo(), layout, may_share=True).of([prompt], shares=False) is None


@pytest.mark.parametrize("shape", [StepShape(4, 4, shares=True), StepShape(64, 64, has_chunks=True)])
def test_a_step_without_tokens_writes_nothing_and_attends_to_nothing(shape: StepShape) -> None:
    sizes = shape.sizes(a_layout(), 0)
    inputs = views(np.full(sizes.num_numbers, 77, dtype=np.int32), sizes)
    nobody = np.zeros(0, dtype=np.int32)
    fill(inputs, (), nobody, np.zeros((0, a_layout().table_blocks), dtype=np.int32), None, (), a_layout())
    assert (inputs.slots == -1).all()
    assert (inputs.sample_places == -1).all()
    assert (inputs.pieces == -1).all()
    assert not inputs.tiles.any()
    assert not inputs.shared_pieces.any()


def test_how_many_tokens_are_chosen_moves_nothing_that_a_graph_reads() -> None:
    shape = StepShape(64, 64, has_chunks=True)
    places = []
    for num_samples in (0, 3, 30):
        sizes = shape.sizes(a_layout(), num_samples)
        numbers = np.zeros(sizes.num_numbers, dtype=np.int32)
        inputs = views(numbers, sizes)
        parts = [field.name for field in fields(StepInputs) if not field.name.startswith("sample_")]
        places.append([getattr(inputs, part).ctypes.data - numbers.ctypes.data for part in parts])
    assert places[0] == places[1] == places[2]


def test_shapes_are_captured_in_the_order_in_which_a_growing_load_comes_to_them() -> None:
    usual = shapes(a_layout()).usual()
    assert len(usual) == len(set(usual))
    assert usual[0] == StepShape(1, 1)
    assert usual.index(StepShape(512, 64, has_chunks=True)) < usual.index(StepShape(68, 68))
    assert {shape.num_decodes for shape in usual if shape.has_chunks and shape.num_rows == 512} == {64, 100}
    assert {shape for shape in usual if shape.shares} == {
        StepShape(size, size, shares=True) for size in decode_sizes(MOST_SEQUENCES) if size >= 16
    }
