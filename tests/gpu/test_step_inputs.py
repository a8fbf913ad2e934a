"""How a step's chunks are dealt out to the kernels of attention."""

from dataclasses import fields

import numpy as np
import pytest

from services.worker.cuda.dense_attention import DenseRun, dense_runs
from services.worker.cuda.step_inputs import StepInputs, StepLayout, mixed_sizes, views
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk


def a_chunk(number: int, first_position: int, num_tokens: int) -> SequenceChunk:
    blocks = tuple(BlockId(block) for block in range(-(-(first_position + num_tokens) // 64)))
    return SequenceChunk(SequenceId(number), (1,) * num_tokens, first_position, blocks, SamplingParameters(), 0)


def a_layout(*, is_batch_invariant: bool = False) -> StepLayout:
    return StepLayout(2048, 64, False, not is_batch_invariant, is_batch_invariant, 64)


def test_whole_prompts_of_one_length_are_taken_together_in_powers_of_two() -> None:
    chunks = [a_chunk(1, 9, 1), *(a_chunk(number, 0, 512) for number in range(2, 5)), a_chunk(5, 0, 1024)]
    assert dense_runs(chunks) == (DenseRun(1, 2, 512), DenseRun(1025, 1, 512), DenseRun(1537, 1, 1024))


@pytest.mark.parametrize(
    ("chunks", "is_one_run"),
    [([a_chunk(1, 0, 512), a_chunk(2, 0, 512)], True), ([a_chunk(1, 0, 512)] * 3, False),
     ([a_chunk(1, 9, 1), a_chunk(2, 0, 512)], False), ([a_chunk(1, 0, 512), a_chunk(2, 0, 7)], False)],
)  # fmt: skip
def test_a_step_may_be_one_run(chunks: list[SequenceChunk], is_one_run: bool) -> None:
    sizes, _ = mixed_sizes(chunks, a_layout(), shares=False)
    assert sizes.is_one_run is is_one_run


def test_every_row_is_attended_once() -> None:
    chunks = [a_chunk(1, 700, 1), a_chunk(2, 0, 512), a_chunk(3, 512, 512), a_chunk(4, 0, 70), a_chunk(5, 8, 1)]
    sizes, tiles = mixed_sizes(chunks, a_layout(), shares=False)
    assert (sizes.num_rows, sizes.num_decodes, sizes.num_samples) == (1096, 1, 5)
    rows = [0]
    for run in sizes.dense_runs:
        rows += range(run.rows.start, run.rows.stop)
    for first_row, num_rows, first_position, chunk in tiles.tolist():
        rows += range(first_row, first_row + num_rows)
        begin = {2: 513, 3: 1025, 4: 1095}[chunk]
        assert first_position == chunks[chunk].first_position + first_row - begin
    assert sorted(rows) == list(range(1096))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 6, 7])
def test_each_part_of_a_steps_inputs_begins_at_16_bytes(num_tokens: int) -> None:
    """A kernel is compiled anew for a pointer that does not: in the middle of a request, that would be."""
    chunks = [a_chunk(1, 700, 1), a_chunk(2, 0, num_tokens), a_chunk(3, 64, 2 * num_tokens)]
    sizes, _ = mixed_sizes(chunks, a_layout(), shares=True)
    numbers = np.zeros(sizes.num_numbers, dtype=np.int32)
    inputs = views(numbers, sizes)
    for part in fields(StepInputs):
        array = getattr(inputs, part.name)
        assert (array.ctypes.data - numbers.ctypes.data) % 16 == 0, part.name
        array += 1
    assert numbers.max() == 1, "no two parts share a number"


def test_a_prompts_last_token_is_attended_as_the_others_where_batches_may_not_matter() -> None:
    first, later = a_chunk(1, 70, 1), a_chunk(2, 70, 1)._replace(sample_index=1)
    sizes, tiles = mixed_sizes([later, first], a_layout(is_batch_invariant=True), shares=False)
    assert (sizes.num_decodes, sizes.num_tiles, sizes.num_pieces) == (1, 1, 2)
    assert tiles.tolist() == [[1, 1, 70, 1]]
    assert a_layout(is_batch_invariant=True).num_decodes([first]) == 0
    assert a_layout().num_decodes([first]) == 1


def test_pieces_of_a_context_depend_on_nothing_else_where_batches_may_not_matter() -> None:
    layout = a_layout(is_batch_invariant=True)
    assert {layout.piece_tokens(np.array(tokens), 9) for tokens in ([1], [2048], [70] * 9)} == {1024}
