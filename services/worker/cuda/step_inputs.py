"""What a step's kernels are told, as one piece of int32 numbers: one copy to the device a step.

Rows are the tokens of all chunks behind each other, in the plan's order, decodes first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.worker.cuda.dense_attention import DenseRun, dense_runs, is_dense
from services.worker.engine.step_plan import SequenceChunk
from services.worker.kernels.decode_attention import (
    PIECE_COLUMNS,
    SPLIT_COLUMNS,
    DecodeBatch,
    cut_contexts,
    num_pieces_for,
)
from services.worker.kernels.prefill_attention import TILE_COLUMNS, cut_chunks

Numbers = NDArray[np.int32]
Array = TypeVar("Array", Numbers, Tensor)

LEAST_PIECE_TOKENS = 64
_GRANULE = 4


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How many there are of each thing in a step, what fills it up included."""

    num_rows: int
    num_decodes: int
    """Rows in front that are a sequence's only ones: attended by the decode kernel."""
    num_chunks: int
    num_samples: int
    num_pieces: int
    num_tiles: int
    table_blocks: int
    """Width of a block table."""
    dense_runs: tuple[DenseRun, ...] = ()
    """Whole prompts, which are in no tile."""

    @property
    def num_numbers(self) -> int:
        """Length of the whole piece."""
        return sum(map(_room, self.shapes))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the parts, in the order of `StepInputs`."""
        return (
            *[(self.num_rows,)] * 4,
            *[(self.num_samples,)] * 2,
            (self.num_pieces, PIECE_COLUMNS),
            (self.num_decodes, SPLIT_COLUMNS),
            (self.num_tiles, TILE_COLUMNS),
            (self.num_chunks, self.table_blocks),
        )


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Array]):
    """Views of the piece's parts, on the host to fill it or on the device to read it."""

    token_ids: Array
    """[num_rows]; -1: the token that was sampled last at the row's place"""
    positions: Array
    """[num_rows]"""
    slots: Array
    """[num_rows]: block * block_size_tokens + place in the block; -1: the row is computed for nothing"""
    places: Array
    """[num_rows]: where the sequence's last token is kept on the device"""
    sample_rows: Array
    """[num_samples]: rows that a token is chosen after"""
    sample_places: Array
    """[num_samples]; -1: computed for nothing"""
    pieces: Array
    """[num_pieces, PIECE_COLUMNS]"""
    splits: Array
    """[num_decodes, SPLIT_COLUMNS]"""
    tiles: Array
    """[num_tiles, TILE_COLUMNS]"""
    block_tables: Array
    """[num_chunks, table_blocks]"""


def views(numbers: Array, sizes: StepSizes) -> StepInputs[Array]:
    """Cut a piece into its parts."""
    parts, begin = [], 0
    for shape in sizes.shapes:
        parts.append(numbers[begin : begin + math.prod(shape)].reshape(shape))
        begin += _room(shape)
    return StepInputs(*parts)


def _room(shape: tuple[int, ...]) -> int:
    """Numbers that a part takes: the next one begins at a multiple of 16 bytes.

    Triton compiles a kernel anew for a pointer that is no such multiple: in the middle of a request, that would be.
    """
    return -(-math.prod(shape) // _GRANULE) * _GRANULE


def decode_sizes(num_rows: int, table_blocks: int, *, has_fp8_cache: bool) -> StepSizes:
    """Sizes of a step of decodes alone, one row each."""
    num_pieces = num_pieces_for(num_rows, has_fp8_cache)
    return StepSizes(num_rows, num_rows, num_rows, num_rows, num_pieces, 0, table_blocks)


def is_decode(chunk: SequenceChunk) -> bool:
    """Whether a chunk is one token whose successor is chosen, with nothing else to tell."""
    return len(chunk.token_ids) == 1 and chunk.sample_index is not None and not chunk.scored_token_ids


def mixed_sizes(
    chunks: Sequence[SequenceChunk], table_blocks: int, *, has_fp8_cache: bool, may_be_dense: bool
) -> tuple[StepSizes, Numbers]:
    """Sizes of a step of any chunks, exactly, and the tiles of those that are more than a token."""
    counts = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int32)
    is_longer = counts > 1
    num_decodes = int(is_longer.argmax()) if is_longer.any() else len(chunks)
    first_rows = np.cumsum(counts) - counts
    runs = dense_runs(chunks) if may_be_dense else ()
    tiled = np.array(
        [i for i in range(num_decodes, len(chunks)) if not (may_be_dense and is_dense(chunks[i]))], dtype=np.int64
    )
    first_positions = np.array([chunk.first_position for chunk in chunks], dtype=np.int32)
    tiles = cut_chunks(first_rows[tiled].astype(np.int32), counts[tiled], first_positions[tiled])
    tiles[:, 3] = tiled[tiles[:, 3]]
    sizes = StepSizes(
        num_rows=int(counts.sum()),
        num_decodes=num_decodes,
        num_chunks=len(chunks),
        num_samples=sum(chunk.sample_index is not None for chunk in chunks),
        num_pieces=num_pieces_for(num_decodes, has_fp8_cache),
        num_tiles=len(tiles),
        table_blocks=table_blocks,
        dense_runs=runs,
    )
    return sizes, tiles


def fill(
    inputs: StepInputs[Numbers],
    chunks: Sequence[SequenceChunk],
    places: Numbers,
    tables: Numbers,
    tiles: Numbers | None,
    block_size_tokens: int,
) -> None:
    """Write a step. Chunks may be fewer than there is room for; what is behind them is computed for nothing.

    places: [num_chunks]; tables: [num_chunks, table_blocks].
    """
    counts = np.array([len(chunk.token_ids) for chunk in chunks])
    num_rows, num_chunks = int(counts.sum()), len(chunks)
    chunk_of_row = np.repeat(np.arange(num_chunks), counts)
    first_rows = np.cumsum(counts) - counts
    first_positions = np.array([chunk.first_position for chunk in chunks], dtype=np.int32)
    positions = first_positions[chunk_of_row] + (np.arange(num_rows) - first_rows[chunk_of_row])
    blocks = tables[chunk_of_row, positions // block_size_tokens]
    inputs.token_ids[:num_rows] = np.fromiter(
        chain.from_iterable(chunk.token_ids for chunk in chunks), dtype=np.int32, count=num_rows
    )
    inputs.positions[:num_rows] = positions
    inputs.slots[:num_rows] = blocks * block_size_tokens + positions % block_size_tokens
    inputs.places[:num_rows] = places[chunk_of_row]
    inputs.token_ids[num_rows:] = 0
    inputs.positions[num_rows:] = 0
    inputs.slots[num_rows:] = -1
    inputs.places[num_rows:] = 0

    samples = np.array([chunk.sample_index is not None for chunk in chunks])
    num_samples = int(samples.sum())
    inputs.sample_rows[:num_samples] = (first_rows + counts - 1)[samples]
    inputs.sample_places[:num_samples] = places[samples]
    inputs.sample_rows[num_samples:] = 0
    inputs.sample_places[num_samples:] = -1

    num_decodes = min(len(inputs.splits), num_chunks)
    if num_decodes:
        contexts = first_positions[:num_decodes] + 1
        pieces, splits = cut_contexts(contexts, len(inputs.pieces), block_size_tokens, LEAST_PIECE_TOKENS)
        inputs.pieces[: len(pieces)] = pieces
        inputs.pieces[len(pieces) :] = -1
        inputs.splits[:num_decodes] = splits
        inputs.splits[num_decodes:] = 0
    if tiles is not None:
        inputs.tiles[:] = tiles
    inputs.block_tables[:num_chunks] = tables
    inputs.block_tables[num_chunks:] = 0


def decode_batch(inputs: StepInputs[Tensor]) -> DecodeBatch:
    """What the decode kernel is told."""
    return DecodeBatch(inputs.pieces, inputs.splits, inputs.block_tables)
