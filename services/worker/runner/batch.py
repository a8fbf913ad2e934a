"""A step's plan as tensors: what the forward pass is given beside the weights and the cache.

The tokens of all chunks lie behind each other as rows, ordered so that chunks which are attended together are
neighbours: all chunks of one token (every decode) whose contexts take about the same number of blocks form a group, and
each longer chunk is a group by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from services.worker.engine.step_plan import SequenceChunk, StepPlan


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Chunks of the same number of tokens that are attended together; their rows are neighbours."""

    first_row: int
    num_chunks: int
    chunk_tokens: int
    block_tables: Tensor
    """[num_chunks, num_blocks] int64; short ones are padded with block 0."""
    mask: Tensor
    """Added to the scores: 0, or -inf where a slot is in the token's future or beyond its context.
    [num_chunks, 1, chunk_tokens, num_blocks * block_size_tokens] float32."""

    @property
    def end_row(self) -> int:
        """The row after its last one."""
        return self.first_row + self.num_chunks * self.chunk_tokens


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """A step's tensors."""

    token_ids: Tensor
    """[num_tokens] int64"""
    positions: Tensor
    """[num_tokens] int64"""
    slot_mapping: Tensor
    """Where each token's key and value go: [num_tokens] int64."""
    attention_groups: tuple[AttentionGroup, ...]
    """In order of their rows; together they hold every row once."""
    sample_rows: Tensor
    """The last row of each chunk that samples, in the plan's order: [num_samples] int64."""
    scored_rows: Tensor
    """The rows that each chunk's `scored_token_ids` follow, in the plan's order: [num_scored] int64."""


def make_batch(plan: StepPlan, block_size_tokens: int) -> BatchInputs:
    """Lay a plan out as tensors."""
    chunks = sorted(plan.chunks, key=lambda chunk: _group_key(chunk, block_size_tokens))
    last_rows: dict[int, int] = {}
    num_rows = 0
    for chunk in chunks:
        num_rows += len(chunk.token_ids)
        last_rows[chunk.sequence_id] = num_rows - 1
    scored = [row for chunk in plan.chunks for row in _scored_rows(chunk, last_rows[chunk.sequence_id])]
    samples = [last_rows[chunk.sequence_id] for chunk in plan.chunks if chunk.sample_index is not None]
    positions = [position for chunk in chunks for position in range(chunk.first_position, chunk.context_tokens)]
    return BatchInputs(
        token_ids=torch.tensor([token_id for chunk in chunks for token_id in chunk.token_ids], dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(
            [slot for chunk in chunks for slot in _slots(chunk, block_size_tokens)], dtype=torch.int64
        ),
        attention_groups=tuple(_attention_groups(chunks, block_size_tokens)),
        sample_rows=torch.tensor(samples, dtype=torch.int64),
        scored_rows=torch.tensor(scored, dtype=torch.int64),
    )


def _scored_rows(chunk: SequenceChunk, last_row: int) -> range:
    """A chunk that samples has no given token behind its last one."""
    end = last_row + 1 - (chunk.sample_index is not None)
    return range(end - len(chunk.scored_token_ids), end)


def _slots(chunk: SequenceChunk, block_size_tokens: int) -> Iterator[int]:
    for position in range(chunk.first_position, chunk.context_tokens):
        yield chunk.block_table[position // block_size_tokens] * block_size_tokens + position % block_size_tokens


def _group_key(chunk: SequenceChunk, block_size_tokens: int) -> tuple[int, int]:
    """Chunks of one token share a group if none has twice the blocks of another; a longer chunk is by itself."""
    if len(chunk.token_ids) == 1:
        return 0, (_num_context_blocks(chunk, block_size_tokens) - 1).bit_length()
    return 1, chunk.sequence_id


def _attention_groups(chunks: Sequence[SequenceChunk], block_size_tokens: int) -> Iterator[AttentionGroup]:
    first_row = 0
    for _, members in groupby(chunks, key=lambda chunk: _group_key(chunk, block_size_tokens)):
        group = _attention_group(first_row, list(members), block_size_tokens)
        yield group
        first_row = group.end_row


def _attention_group(first_row: int, chunks: Sequence[SequenceChunk], block_size_tokens: int) -> AttentionGroup:
    chunk_tokens = len(chunks[0].token_ids)
    num_blocks = max(_num_context_blocks(chunk, block_size_tokens) for chunk in chunks)
    tables = [chunk.block_table[: _num_context_blocks(chunk, block_size_tokens)] for chunk in chunks]
    first_positions = torch.tensor([chunk.first_position for chunk in chunks])
    query_positions = first_positions[:, None] + torch.arange(chunk_tokens)
    key_positions = torch.arange(num_blocks * block_size_tokens)
    is_hidden = key_positions > query_positions[:, None, :, None]
    return AttentionGroup(
        first_row=first_row,
        num_chunks=len(chunks),
        chunk_tokens=chunk_tokens,
        block_tables=torch.tensor([[*table, *[0] * (num_blocks - len(table))] for table in tables]),
        mask=torch.zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf")),
    )


def _num_context_blocks(chunk: SequenceChunk, block_size_tokens: int) -> int:
    return -(-chunk.context_tokens // block_size_tokens)
