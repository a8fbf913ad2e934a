"""Computes steps on the CPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.step_plan import ChunkResult, SequenceChunk, StepPlan, StepResult, TokenLogprobs
from services.worker.runner.batch import make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.logprobs import Place, token_logprobs
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.sampling import Draw, sample

SCORED_AT_ONCE = 32
"""Rows of given tokens whose logits are in memory together: 6 MB for a vocabulary of 49,152."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that was computed by the time it was launched."""

    _result: StepResult

    def is_done(self) -> bool:
        """It is."""
        return True

    def result(self) -> StepResult:
        """Return what the step sampled."""
        return self._result


class CpuRunner:
    """A model and its KV cache in this process: a `Runner` of the engine."""

    steps_ahead = 0
    """A step is done when it is launched: nothing is gained by planning another meanwhile."""

    def __init__(self, model: Decoder, cache: PagedKvCache) -> None:
        self._model = model
        self._cache = cache

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> FinishedStep:
        """Compute a step."""
        self._cache.copy(plan.block_copies)
        batch = make_batch(plan, self._cache)
        hidden = self._model.forward(batch, self._cache)
        sampled = self._sampled(hidden[batch.sampled], [c for c in plan.chunks if c.sample_index is not None])
        scored = self._scored(hidden, batch.scored, plan.chunks)
        return FinishedStep(step_result(plan, sampled, scored))

    def prepare(self) -> bool:
        """There is nothing to prepare."""
        return False

    def _sampled(self, hidden: Tensor, chunks: Sequence[SequenceChunk]) -> Iterator[tuple[int, TokenLogprobs | None]]:
        """Choose a token for each chunk that samples, of the row of `hidden` that is its last."""
        logits = self._model.logits(hidden)
        token_ids = sample(logits, draws_of(chunks))
        asked = {
            row: Place(token_id, chunk.sampling.num_logprobs)
            for row, (token_id, chunk) in enumerate(zip(token_ids, chunks, strict=True))
            if chunk.sampling.num_logprobs is not None
        }
        logprobs = dict(zip(asked, token_logprobs(logits[list(asked)], list(asked.values())), strict=True))
        return ((token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids))

    def _scored(self, hidden: Tensor, rows: Tensor, chunks: Sequence[SequenceChunk]) -> Iterator[TokenLogprobs]:
        """Log-probabilities of all given tokens that are asked for, in the order of `rows`; some rows at a time."""
        places = scored_places(chunks)
        for first in range(0, len(places), SCORED_AT_ONCE):
            logits = self._model.logits(hidden[rows[first : first + SCORED_AT_ONCE]])
            yield from token_logprobs(logits, places[first : first + SCORED_AT_ONCE])


def draws_of(chunks: Sequence[SequenceChunk]) -> list[Draw]:
    """Return the draws of the chunks that sample."""
    return [
        Draw(chunk.sampling, chunk.sample_index, chunk.seen, chunk.allowed_tokens)
        for chunk in chunks
        if chunk.sample_index is not None
    ]


def scored_places(chunks: Sequence[SequenceChunk]) -> list[Place]:
    """Return all given tokens that are asked for, in the plan's order."""
    return [
        Place(token_id, chunk.sampling.num_scored_logprobs) for chunk in chunks for token_id in chunk.scored_token_ids
    ]


def step_result(
    plan: StepPlan, sampled: Iterator[tuple[int, TokenLogprobs | None]], scored: Iterator[TokenLogprobs]
) -> StepResult:
    """Give each chunk what is its own of what was sampled and scored, both in the plan's order."""
    results = []
    for chunk in plan.chunks:
        token_id, logprobs = next(sampled) if chunk.sample_index is not None else (None, None)
        results.append(ChunkResult(token_id, logprobs, tuple(next(scored) for _ in chunk.scored_token_ids)))
    return StepResult(tuple(results))
