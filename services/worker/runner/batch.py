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
from services.worker.runner.attention import AttentionGroup
from services.worker.runner.decode_attention import make_decode_group
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.prefill_attention import make_prefill_chunk


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """A step's tensors."""

    token_ids: Tensor
    """[num_tokens] int64"""
    positions: Tensor
    """[num_tokens] int64"""
    write_rows: Tensor
    """Where keys and values go in the cache, as `PagedKvCache.write` takes them."""
    attention_groups: tuple[AttentionGroup, ...]
    """In order of their rows; together they hold every row once."""
    sliding_groups: tuple[AttentionGroup, ...]
    """The same rows in the same groups, for layers with a sliding window; empty for a model without one."""
    sample_rows: Tensor
    """The last row of each chunk that samples, in the plan's order: [num_samples] int64."""
    scored_rows: Tensor
    """The rows that each chunk's `scored_token_ids` follow, in the plan's order: [num_scored] int64."""


def make_batch(plan: StepPlan, cache: PagedKvCache) -> BatchInputs:
    """Lay a plan out as tensors."""
    block_size_tokens, window = cache.block_size_tokens, cache.config.sliding_window
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
        write_rows=cache.write_rows(
            torch.tensor([slot for chunk in chunks for slot in _slots(chunk, block_size_tokens)], dtype=torch.int64)
        ),
        attention_groups=tuple(_attention_groups(chunks, cache, None)),
        sliding_groups=tuple(_attention_groups(chunks, cache, window) if window else ()),
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
        return 0, (-(-chunk.context_tokens // block_size_tokens) - 1).bit_length()
    return 1, chunk.sequence_id


def _attention_groups(
    chunks: Sequence[SequenceChunk], cache: PagedKvCache, window: int | None
) -> Iterator[AttentionGroup]:
    first_row = 0
    for _, members in groupby(chunks, key=lambda chunk: _group_key(chunk, cache.block_size_tokens)):
        group = list(members)
        if len(group[0].token_ids) == 1:
            yield make_decode_group(first_row, group, cache, window)
        else:
            yield make_prefill_chunk(first_row, group[0], cache, window)
        first_row += sum(len(chunk.token_ids) for chunk in group)
