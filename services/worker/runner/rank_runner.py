"""Computes a rank's part of steps on the CPU; rank 0 says what came of them."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from services.worker.engine.runner import RanksDisagreeError
from services.worker.engine.step_plan import SequenceChunk, StepPlan, StepResult, TokenLogprobs
from services.worker.plan_ring import PlanWriter
from services.worker.runner.batch import BatchInputs, make_batch
from services.worker.runner.cpu_runner import SCORED_AT_ONCE, FinishedStep, draws_of, scored_places, step_result
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.logprobs import Place, token_logprobs
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.rank_sampling import DealtVocabulary, is_narrow
from services.worker.runner.ranks import Ranks
from services.worker.runner.sampling import sample


class ShardedRunner:
    """Rank 0, which leads the others: a `Runner` of the engine."""

    steps_ahead = 0

    def __init__(self, rank: "RankRunner", plans: PlanWriter) -> None:
        self._rank = rank
        self._plans = plans

    def launch(self, plan: StepPlan) -> FinishedStep:
        """Compute a step with all ranks. Raises RanksLostError and RanksDisagreeError."""
        self._plans.send(plan)
        result = self._rank.compute(plan)
        assert result is not None
        return FinishedStep(result)

    def prepare(self) -> bool:
        """There is nothing to prepare."""
        return False


class RankRunner:
    """A rank's part of a model and of its KV cache."""

    def __init__(self, model: Decoder, cache: PagedKvCache, ranks: Ranks, vocabulary: DealtVocabulary) -> None:
        self._model = model
        self._cache = cache
        self._ranks = ranks
        self._vocabulary = vocabulary

    @torch.inference_mode()
    def compute(self, plan: StepPlan) -> StepResult | None:
        """Take part in a step. Its result is rank 0's to say; None on the others.

        Raises RanksLostError, and RanksDisagreeError on every rank.
        """
        self._cache.copy(plan.block_copies)
        batch = make_batch(plan, self._cache)
        hidden = self._model.forward(batch, self._cache)
        self._check_agreement(plan.step, batch, hidden)
        sampling = [chunk for chunk in plan.chunks if chunk.sample_index is not None]
        sampled = self._sampled(hidden[batch.sampled], sampling)
        scored = self._scored(hidden[batch.scored], plan.chunks)
        if self._ranks.shard.rank > 0:
            return None
        return step_result(plan, iter(sampled), iter(scored))

    def _check_agreement(self, step: int, batch: BatchInputs, hidden: Tensor) -> None:
        """Compare the step's number, what was computed, and what all that is sampled follows from, bit for bit."""
        checksum = zlib.crc32(step.to_bytes(8, "little"))
        for tensor in (batch.token_ids, batch.positions, batch.slots, batch.block_tables, hidden):
            checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
        # As two halves, which float32 holds exactly.
        own = torch.tensor([checksum >> 16, checksum & 0xFFFF], dtype=torch.float32)
        all_given = self._ranks.gather(own, [len(own)] * self._ranks.shard.world_size)
        if any(not torch.equal(given, own) for given in all_given):
            raise RanksDisagreeError(f"ranks differ in step {step}: {[given.tolist() for given in all_given]}")

    def _sampled(self, hidden: Tensor, chunks: Sequence[SequenceChunk]) -> list[tuple[int, TokenLogprobs | None]]:
        """Choose a token for each chunk that samples, of the row of `hidden` that is its last."""
        draws = draws_of(chunks)
        narrow = [row for row, draw in enumerate(draws) if is_narrow(draw) and draw.parameters.num_logprobs is None]
        wide = sorted({*range(len(draws))} - {*narrow})
        logits = self._model.logits(hidden)
        chosen: dict[int, tuple[int, TokenLogprobs | None]] = {}
        if narrow:
            token_ids = self._vocabulary.choose(logits[narrow], [draws[row] for row in narrow])
            chosen.update((row, (token_id, None)) for row, token_id in zip(narrow, token_ids, strict=True))
        for first in range(0, len(wide), self._vocabulary.rows_at_once):
            rows = wide[first : first + self._vocabulary.rows_at_once]
            whole = self._vocabulary.whole(logits[rows])
            if self._ranks.shard.rank > 0:
                continue
            for row, row_logits in zip(rows, torch.split(whole, 1), strict=True):
                (token_id,) = sample(row_logits, [draws[row]])
                num_top = draws[row].parameters.num_logprobs
                logprobs = None if num_top is None else token_logprobs(row_logits, [Place(token_id, num_top)])[0]
                chosen[row] = token_id, logprobs
        return [chosen[row] for row in sorted(chosen)]

    def _scored(self, hidden: Tensor, chunks: Sequence[SequenceChunk]) -> list[TokenLogprobs]:
        """Log-probabilities of all given tokens that are asked for; some rows at a time."""
        places = scored_places(chunks)
        at_once = min(SCORED_AT_ONCE, self._vocabulary.rows_at_once)
        told: list[TokenLogprobs] = []
        for first in range(0, len(places), at_once):
            whole = self._vocabulary.whole(self._model.logits(hidden[first : first + at_once]))
            if self._ranks.shard.rank == 0:
                told += token_logprobs(whole, places[first : first + at_once])
        return told
