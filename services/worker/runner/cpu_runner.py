"""Computes steps on the CPU."""

from dataclasses import dataclass

import torch

from services.worker.engine.step_plan import ChunkResult, StepPlan, StepResult
from services.worker.runner.batch import make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.llama import LlamaModel
from services.worker.runner.sampling import Draw, sample


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that was computed by the time it was launched."""

    _result: StepResult

    def result(self) -> StepResult:
        """Return what the step sampled."""
        return self._result


class CpuRunner:
    """A model and its KV cache in this process: a `Runner` of the engine."""

    steps_ahead = 0
    """A step is done when it is launched: nothing is gained by planning another meanwhile."""

    def __init__(self, model: LlamaModel, cache: PagedKvCache) -> None:
        self._model = model
        self._cache = cache

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> FinishedStep:
        """Compute a step."""
        self._cache.copy(plan.block_copies)
        batch = make_batch(plan, self._cache.block_size_tokens)
        logits = self._model.forward(batch, self._cache)
        draws = [Draw(chunk.sampling, chunk.sample_index) for chunk in plan.chunks if chunk.sample_index is not None]
        sampled = iter(sample(logits, draws))
        results = [ChunkResult(None if chunk.sample_index is None else next(sampled)) for chunk in plan.chunks]
        return FinishedStep(StepResult(tuple(results)))
