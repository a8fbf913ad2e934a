"""A step as plain values: what the planner decides, what a runner gives back.

They hold nothing but numbers, so that they can be sent to further ranks as they are.
"""

from dataclasses import dataclass

from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The part of one sequence that a step computes."""

    sequence_id: SequenceId
    token_ids: tuple[int, ...]
    """The tokens to compute; at least one."""
    first_position: int
    """Position of `token_ids[0]` in the sequence. All positions before it are in the cache."""
    block_table: tuple[BlockId, ...]
    """Block i holds positions i * block_size_tokens and up; covers at least the chunk's last position."""
    sampling: SamplingParameters
    sample_index: int | None
    """Index, in its choice, of the token to sample after the chunk's last one. None: nothing is sampled."""

    @property
    def context_tokens(self) -> int:
        """Number of tokens that the chunk's last token attends to, itself included."""
        return self.first_position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step computes: decodes first, then prefill chunks, each in order of admission."""

    step: int
    """From 1."""
    chunks: tuple[SequenceChunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_attended_tokens(self) -> int:
        """Pairs of a computed token and a token that it attends to."""
        return sum(
            len(chunk.token_ids) * (chunk.first_position + chunk.context_tokens + 1) // 2 for chunk in self.chunks
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled."""

    sampled_token_ids: tuple[int | None, ...]
    """One for each chunk of the plan, None where nothing was to be sampled."""
