"""A step's plan as tensors: what the forward pass is given beside the weights and the cache.

The tokens of all chunks lie behind each other as rows, in the plan's order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.cpu_kernels.library import address
from services.worker.cpu_kernels.structures import Batch
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.runner.kv_cache import PagedKvCache

TILE_QUERIES = 24
"""Queries that are attended together, heads that share keys counted each: with their sums they stay in the cache of the
first level. The kernel's most is 32."""


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """A step's tensors, all int64."""

    token_ids: Tensor
    """[num_tokens]"""
    positions: Tensor
    """[num_tokens]"""
    slots: Tensor
    """Where each token's keys and values go in the cache: [num_tokens]."""
    tiles: Tensor
    """Neighbouring tokens of a chunk, to be attended together: first row, number of rows, position of the first, where
    the sequence's blocks begin in `block_tables`. [num_tiles, 4]; they hold every row once."""
    block_tables: Tensor
    """The blocks of all sequences, one sequence behind the other."""
    wanted_rows: Tensor
    """The rows whose hidden states are wanted, ascending: those that something is sampled or scored after.
    [num_wanted]"""
    wanted_tiles: Tensor
    """The wanted rows as tiles of one row each, numbered by their places in `wanted_rows`: [num_wanted, 4]."""
    sampled: Tensor
    """Which of the wanted rows are the last of a chunk that samples, in the plan's order: [num_samples]."""
    scored: Tensor
    """Which of the wanted rows each chunk's `scored_token_ids` follow, in the plan's order: [num_scored]."""

    def structure(self) -> Batch:
        """Return what the kernels take. It points to these tensors, which have to outlive it."""
        tensors = (self.positions, self.slots, self.tiles, self.block_tables, self.wanted_rows, self.wanted_tiles)
        return Batch(
            len(self.token_ids),
            len(self.tiles),
            len(self.wanted_rows),
            *(address(tensor, torch.int64) for tensor in tensors),
        )


def make_batch(plan: StepPlan, cache: PagedKvCache) -> BatchInputs:
    """Lay a plan out as tensors."""
    config = cache.config
    tile_tokens = max(1, TILE_QUERIES * config.num_kv_heads // config.num_heads)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tiles: list[tuple[int, int, int, int]] = []
    block_tables: list[int] = []
    wanted_rows: list[int] = []
    wanted_tiles: list[tuple[int, int, int, int]] = []
    sampled: list[int] = []
    scored: list[int] = []
    for chunk in plan.chunks:
        first_row, table_start = len(token_ids), len(block_tables)
        tiles.extend(_tiles(chunk, first_row, table_start, tile_tokens))
        token_ids.extend(chunk.token_ids)
        positions.extend(range(chunk.first_position, chunk.context_tokens))
        slots.extend(_slots(chunk, cache.block_size_tokens))
        block_tables.extend(chunk.block_table)
        wanted = _wanted_rows(chunk, first_row)
        places = range(len(wanted_rows), len(wanted_rows) + len(wanted))
        wanted_rows.extend(wanted)
        wanted_tiles.extend((place, 1, positions[row], table_start) for place, row in zip(places, wanted, strict=True))
        scored.extend(places[: len(chunk.scored_token_ids)])
        if chunk.sample_index is not None:
            sampled.append(places[-1])
    return BatchInputs(
        *(
            torch.tensor(values, dtype=torch.int64)
            for values in (
                *(token_ids, positions, slots, tiles, block_tables),
                *(wanted_rows, wanted_tiles, sampled, scored),
            )
        )
    )


def _tiles(
    chunk: SequenceChunk, first_row: int, table_start: int, tile_tokens: int
) -> Iterator[tuple[int, int, int, int]]:
    num_tokens = len(chunk.token_ids)
    for first in range(0, num_tokens, tile_tokens):
        yield first_row + first, min(tile_tokens, num_tokens - first), chunk.first_position + first, table_start


def _slots(chunk: SequenceChunk, block_size_tokens: int) -> Iterator[int]:
    for position in range(chunk.first_position, chunk.context_tokens):
        yield chunk.block_table[position // block_size_tokens] * block_size_tokens + position % block_size_tokens


def _wanted_rows(chunk: SequenceChunk, first_row: int) -> range:
    """Those that are scored, then the one that samples: neighbours, since no given token follows a row that samples."""
    end = first_row + len(chunk.token_ids)
    return range(end - len(chunk.scored_token_ids) - (chunk.sample_index is not None), end)
