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
from services.worker.cuda.shared_prefixes import SharedPrefix
from services.worker.engine.step_plan import SequenceChunk
from services.worker.kernels.decode_attention import (
    INVARIANT_PIECE_TOKENS,
    PIECE_COLUMNS,
    SPLIT_COLUMNS,
    DecodeBatch,
    cut_contexts,
    even_length,
    num_pieces_for,
)
from services.worker.kernels.prefill_attention import TILE_COLUMNS, cut_chunks
from services.worker.kernels.shared_attention import MOST_MEMBERS, SHARED_COLUMNS

Numbers = NDArray[np.int32]
Array = TypeVar("Array", Numbers, Tensor)

LEAST_PIECE_TOKENS = 64
_LEAST_SHARED_PIECE_TOKENS = 256
_SHARED_PIECES = 32
"""Into how many pieces prefixes are cut: with 8 key heads, programs for all 132 processors, two on each."""
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
    num_shared_pieces: int = 0
    """0: no decode shares a prefix."""
    dense_runs: tuple[DenseRun, ...] = ()
    """Whole prompts, which are in no tile."""
    keeps_all_rows: bool = False
    """Whether the last hidden states of others than the sampled rows are wanted."""

    @property
    def has_both(self) -> bool:
        """Whether there may be decodes and prompts."""
        return self.num_decodes > 0 and (self.num_tiles > 0 or bool(self.dense_runs))

    @property
    def is_one_run(self) -> bool:
        """Whether all rows are whole prompts of one length."""
        return len(self.dense_runs) == 1 and self.dense_runs[0].rows == slice(0, self.num_rows)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the parts, in the order of StepInputs. Samples last: how many there are moves no other part."""
        return (
            *[(self.num_rows,)] * 4,
            (self.num_pieces, PIECE_COLUMNS),
            (self.num_decodes, SPLIT_COLUMNS),
            (self.num_shared_pieces, SHARED_COLUMNS),
            (self.num_tiles, TILE_COLUMNS),
            (self.num_chunks, self.table_blocks),
            *[(self.num_samples,)] * 2,
        )

    @property
    def num_numbers(self) -> int:
        """Length of the whole piece."""
        return sum(map(_room, self.shapes))


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
    pieces: Array
    """[num_pieces, PIECE_COLUMNS]"""
    splits: Array
    """[num_decodes, SPLIT_COLUMNS]"""
    shared_pieces: Array
    """[num_shared_pieces, SHARED_COLUMNS]"""
    tiles: Array
    """[num_tiles, TILE_COLUMNS]"""
    block_tables: Array
    """[num_chunks, table_blocks]"""
    sample_rows: Array
    """[num_samples]: rows that a token is chosen after"""
    sample_places: Array
    """[num_samples]; -1: computed for nothing"""


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


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What is the same for all steps of a runner."""

    context_tokens: int
    """Most tokens of a sequence"""
    block_size_tokens: int
    has_fp8_cache: bool
    may_be_dense: bool
    """Whether whole prompts may be attended by cuDNN."""
    is_batch_invariant: bool
    """Whether a sequence is attended in the same pieces and by the same kernel, whatever else is in its steps."""
    tile_tokens: int
    """Most queries of a tile of `prefill_attention`"""

    @property
    def table_blocks(self) -> int:
        """Width of a block table."""
        return -(-self.context_tokens // self.block_size_tokens)

    def num_pieces(self, num_decodes: int) -> int:
        """Return into how many pieces the contexts of so many decodes are cut at most."""
        if self.is_batch_invariant:
            return num_decodes * -(-self.context_tokens // INVARIANT_PIECE_TOKENS)
        return num_pieces_for(num_decodes, self.has_fp8_cache)

    def piece_tokens(self, own_tokens: Numbers, num_pieces: int) -> int:
        """Return how long pieces of decodes' contexts are."""
        if self.is_batch_invariant:
            return INVARIANT_PIECE_TOKENS
        return even_length(own_tokens, num_pieces, self.block_size_tokens, LEAST_PIECE_TOKENS)

    def num_decodes(self, chunks: Sequence[SequenceChunk]) -> int:
        """Return how many chunks in front are attended as decodes are."""
        for index, chunk in enumerate(chunks):
            # By what else is in a step, a prompt's last token comes alone or not: its kernel must not depend on that.
            is_first = self.is_batch_invariant and not chunk.sample_index
            if len(chunk.token_ids) > 1 or is_first:
                return index
        return len(chunks)


def num_shared_pieces_for(num_decodes: int) -> int:
    """Return how many pieces of prefixes, and so how many tiles of members, a step of so many decodes has at most."""
    return _SHARED_PIECES + num_decodes // 16


def mixed_sizes(chunks: Sequence[SequenceChunk], layout: StepLayout, *, shares: bool) -> tuple[StepSizes, Numbers]:
    """Sizes of a step of any chunks, exactly, and the tiles of those that are more than a token.

    `shares`: some of the decodes have a prefix in common.
    """
    num_decodes = layout.num_decodes(chunks)
    tiles = chunk_tiles(chunks, num_decodes, layout.tile_tokens, leaves_dense=layout.may_be_dense)
    sizes = StepSizes(
        num_rows=sum(len(chunk.token_ids) for chunk in chunks),
        num_decodes=num_decodes,
        num_chunks=len(chunks),
        num_samples=sum(chunk.sample_index is not None for chunk in chunks),
        num_pieces=layout.num_pieces(num_decodes),
        num_tiles=len(tiles),
        table_blocks=layout.table_blocks,
        num_shared_pieces=num_shared_pieces_for(num_decodes) if shares else 0,
        dense_runs=dense_runs(chunks) if layout.may_be_dense else (),
        keeps_all_rows=any(chunk.scored_token_ids for chunk in chunks),
    )
    return sizes, tiles


def chunk_tiles(chunks: Sequence[SequenceChunk], num_decodes: int, tile_tokens: int, *, leaves_dense: bool) -> Numbers:
    """Return the tiles of all chunks behind the decodes, but, if `leaves_dense`, for those that cuDNN attends."""
    counts = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int32)
    first_rows = np.cumsum(counts) - counts
    tiled = np.array(
        [i for i in range(num_decodes, len(chunks)) if not (leaves_dense and is_dense(chunks[i]))], dtype=np.int64
    )
    first_positions = np.array([chunk.first_position for chunk in chunks], dtype=np.int32)
    tiles = cut_chunks(first_rows[tiled].astype(np.int32), counts[tiled], first_positions[tiled], tile_tokens)
    tiles[:, 3] = tiled[tiles[:, 3]]
    return tiles


def fill(
    inputs: StepInputs[Numbers],
    chunks: Sequence[SequenceChunk],
    places: Numbers,
    tables: Numbers,
    tiles: Numbers | None,
    prefixes: Sequence[SharedPrefix],
    layout: StepLayout,
) -> None:
    """Write a step. Chunks and tiles may be fewer than there is room for, or none; what is behind them is computed for
    nothing.

    places: [num_chunks]; tables: [num_chunks, table_blocks]; prefixes: by tiles of the kernel.
    """
    counts = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
    num_rows, num_chunks = int(counts.sum()), len(chunks)
    chunk_of_row = np.repeat(np.arange(num_chunks), counts)
    first_rows = np.cumsum(counts) - counts
    first_positions = np.array([chunk.first_position for chunk in chunks], dtype=np.int32)
    positions = first_positions[chunk_of_row] + (np.arange(num_rows) - first_rows[chunk_of_row])
    block_size_tokens = layout.block_size_tokens
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

    samples = np.array([chunk.sample_index is not None for chunk in chunks], dtype=bool)
    num_samples = int(samples.sum())
    inputs.sample_rows[:num_samples] = (first_rows + counts - 1)[samples]
    inputs.sample_places[:num_samples] = places[samples]
    inputs.sample_rows[num_samples:] = 0
    inputs.sample_places[num_samples:] = -1

    inputs.pieces[:] = -1
    inputs.splits[:] = 0
    inputs.shared_pieces[:] = 0
    num_decodes = layout.num_decodes(chunks)
    if num_decodes:
        own_from = _fill_prefixes(inputs, prefixes, num_decodes, block_size_tokens)
        contexts = first_positions[:num_decodes] + 1
        length = layout.piece_tokens(contexts - own_from, layout.num_pieces(num_decodes))
        pieces, splits = cut_contexts(own_from, contexts, length)
        inputs.pieces[: len(pieces)] = pieces
        inputs.splits[:num_decodes, :2] = splits
    inputs.tiles[:] = 0
    if tiles is not None:
        inputs.tiles[: len(tiles)] = tiles
    inputs.block_tables[:num_chunks] = tables
    inputs.block_tables[num_chunks:] = 0


def _fill_prefixes(
    inputs: StepInputs[Numbers], prefixes: Sequence[SharedPrefix], num_decodes: int, block_size_tokens: int
) -> Numbers:
    """Write what decodes share. Returns the position that each one's own pieces begin at: [num_decodes]."""
    own_from = np.zeros(num_decodes, dtype=np.int32)
    if not prefixes:
        return own_from
    lengths = np.array([prefix.num_blocks * block_size_tokens for prefix in prefixes], dtype=np.int32)
    most_pieces = max(_SHARED_PIECES, len(prefixes))
    length = even_length(lengths, most_pieces, block_size_tokens, _LEAST_SHARED_PIECE_TOKENS)
    pieces, splits = cut_contexts(np.zeros_like(lengths), lengths, length)
    for prefix, shared_tokens, (first_piece, num_pieces) in zip(prefixes, lengths, splits, strict=True):
        members, own = np.array(prefix.members), slice(first_piece, first_piece + num_pieces)
        own_from[members] = shared_tokens
        inputs.splits[members, 2] = first_piece * MOST_MEMBERS + np.arange(len(members))
        inputs.splits[members, 3] = num_pieces
        inputs.shared_pieces[own, 0] = len(members)
        inputs.shared_pieces[own, 1:3] = pieces[own, 1:3]
        inputs.shared_pieces[own, 4 : 4 + len(members)] = members
    return own_from


def decode_batch(inputs: StepInputs[Tensor]) -> DecodeBatch:
    """What the decode kernel is told."""
    return DecodeBatch(inputs.pieces, inputs.splits, inputs.block_tables)
