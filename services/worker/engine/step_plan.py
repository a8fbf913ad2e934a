"""A step as plain values: what the planner decides, what a runner gives back.

They hold nothing but numbers, so that they can be sent to further ranks as they are.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId

PENDING_TOKEN = -1
"""In place of a token that the step before, still running, samples for the same sequence."""


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """What penalties look at."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]


class SequenceChunk(NamedTuple):
    """The part of one sequence that a step computes.

    A tuple, and ChunkResult too: a step has hundreds, and a frozen dataclass takes three times as long to make.
    """

    sequence_id: SequenceId
    token_ids: tuple[int, ...]
    """The tokens to compute; at least one. The last may be PENDING_TOKEN."""
    first_position: int
    """Position of `token_ids[0]` in the sequence. All positions before it are in the cache."""
    block_table: tuple[BlockId, ...]
    """Block i holds positions i * block_size_tokens and up; covers at least the chunk's last position."""
    sampling: SamplingParameters
    sample_index: int | None
    """Index, in its choice, of the token to sample after the chunk's last one. None: nothing is sampled."""
    scored_token_ids: tuple[int, ...] = ()
    """Given tokens whose log-probabilities are asked for, in order. The last of them follows the chunk's last token or,
    if the chunk samples, its last but one."""
    seen: SeenTokens | None = None
    """Set if the sequence has penalties and samples."""
    allowed_tokens: bytes | None = None
    """Bit i % 8 of byte i // 8 says whether token i may be sampled. None: all may."""

    @property
    def context_tokens(self) -> int:
        """Number of tokens that the chunk's last token attends to, itself included."""
        return self.first_position + len(self.token_ids)

    @property
    def num_attended_tokens(self) -> int:
        """Pairs of a token of the chunk and a token that it attends to."""
        return len(self.token_ids) * (self.first_position + self.context_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The content of a block is wanted in another one: it was shared, and one of its holders is about to write."""

    source: BlockId
    destination: BlockId


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step computes: decodes first, then prefill chunks, each in order of admission."""

    step: int
    """From 1."""
    chunks: tuple[SequenceChunk, ...]
    block_copies: tuple[BlockCopy, ...] = ()
    """Done before anything is written; no destination is a source."""
    num_tokens: int = field(init=False)
    """Tokens computed."""
    num_attended_tokens: int = field(init=False)
    """Pairs of a computed token and a token that it attends to."""
    num_scored_tokens: int = field(init=False)
    """Given tokens whose log-probabilities are computed."""

    def __post_init__(self) -> None:
        """Add up, once: the sums are asked for again and again while the step runs."""
        num_tokens = num_attended = num_scored = 0
        for chunk in self.chunks:
            num_tokens += len(chunk.token_ids)
            num_attended += chunk.num_attended_tokens
            num_scored += len(chunk.scored_token_ids)
        object.__setattr__(self, "num_tokens", num_tokens)
        object.__setattr__(self, "num_attended_tokens", num_attended)
        object.__setattr__(self, "num_scored_tokens", num_scored)

    @property
    def has_prefill(self) -> bool:
        """Whether a chunk is more than a token."""
        return self.num_tokens > len(self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one token's place, of the model's distribution: before temperature, penalties and masks."""

    logprob: float
    """Of the token that stands there."""
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of the most probable tokens, best first."""


class ChunkResult(NamedTuple):
    """What a step gave for one chunk."""

    token_id: int | None
    """The sampled token; None where nothing was to be sampled."""
    logprobs: TokenLogprobs | None = None
    """Of the sampled token, if asked for."""
    scored: tuple[TokenLogprobs, ...] = ()
    """One for each of the chunk's `scored_token_ids`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave."""

    chunks: tuple[ChunkResult, ...]
    """One for each chunk of the plan, in its order."""
    took_ms: float | None = None
    """What the device took, from the step before it or its launch, whichever is later. None: it does not say."""
