"""What one engine can hold, fixed at its start."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Capacity of an engine; reported to the front as EngineReady."""

    num_blocks: int
    block_size_tokens: int
    max_sequences: int
    """Most sequences that hold blocks, and so most in a step."""
    max_prefill_tokens_per_step: int
    step_budget_ms: float | None
    """Longest that a step shall take that holds decodes: prefill chunks are cut to it, but for what `step_budget.py`
    says. None: as `batch_work.py` says, whose tokens nobody waits for."""
    context_tokens: int
    """Most tokens of prompt and answer together."""
    vocabulary_size: int
    filled_up_to: tuple[int, ...] = ()
    """Numbers of tokens, ascending, that steps with prompts are filled up to: one between two of them takes as long as
    the larger. One of more than the last is computed as it is."""

    @property
    def longest_chunk_tokens(self) -> int:
        """Most tokens of one sequence in a step."""
        return min(self.max_prefill_tokens_per_step, self.context_tokens)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size_tokens)


def least_size(sizes: Sequence[int], wanted: int) -> int | None:
    """Return the least of some ascending sizes that holds so many; None: none does."""
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None
