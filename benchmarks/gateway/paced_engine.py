"""An engine without a model: the real process, planner and loop, and a runner that only keeps time.

Each step takes SHOAL_BENCH_STEP_MS; its tokens say when it ended. A worker starts it as it starts any engine.
"""

import os
import sys
import time

from services.common.model.stored_model import context_tokens, read_stored_model
from services.common.text.stored_vocabulary import read_vocabulary
from services.worker import engine_process
from services.worker.engine.limits import EngineLimits
from services.worker.engine.runner import Runner
from services.worker.engine.step_plan import ChunkResult, StepPlan, StepResult
from services.worker.engine.step_time import StepTimeModel
from services.worker.engine_config import EngineConfig
from services.worker.pipe import EnginePipe

STEP_MS_VARIABLE = "SHOAL_BENCH_STEP_MS"
FIRST_TOKEN, NUM_TOKENS, TICK_US = 1_000, 40_000, 10
"""Tokens of ordinary text: token FIRST_TOKEN + k was sampled k ticks after a multiple of NUM_TOKENS ticks."""
NUM_BLOCKS = 64 * 1024


class PacedRunner:
    """A step takes its time, whatever is in it."""

    steps_ahead = 0

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def launch(self, plan: StepPlan) -> "PacedStep":
        """Begin a step."""
        return PacedStep(plan, time.perf_counter() + self._step_s)

    def prepare(self) -> bool:
        """There is nothing to prepare."""
        return False


class PacedStep:
    """A step that ends at a given time."""

    def __init__(self, plan: StepPlan, ends_at_s: float) -> None:
        self._plan = plan
        self._ends_at_s = ends_at_s

    def is_done(self) -> bool:
        """Whether its time is over."""
        return time.perf_counter() >= self._ends_at_s

    def result(self) -> StepResult:
        """Wait for its end."""
        time.sleep(max(0.0, self._ends_at_s - time.perf_counter()))
        token_id = token_at(time.monotonic_ns() // 1000)
        return StepResult(
            tuple(ChunkResult(None if chunk.sample_index is None else token_id) for chunk in self._plan.chunks)
        )


def token_at(now_us: int) -> int:
    """The token that is sampled at a time of the system's monotonic clock."""
    return FIRST_TOKEN + now_us // TICK_US % NUM_TOKENS


def age_us(token_id: int, now_us: int) -> int:
    """How long ago a token was sampled, if that is less than 0.4 s; to 10 us."""
    return (now_us // TICK_US - (token_id - FIRST_TOKEN)) % NUM_TOKENS * TICK_US


def load(config: EngineConfig, pipe: EnginePipe) -> tuple[EngineLimits, Runner, StepTimeModel]:
    """In place of the real engine's: nothing is loaded."""
    model = read_stored_model(config.model_path)
    limits = EngineLimits(
        num_blocks=NUM_BLOCKS,
        block_size_tokens=config.block_size_tokens,
        max_sequences=config.max_sequences,
        max_prefill_tokens_per_step=config.max_prefill_tokens_per_step,
        step_budget_ms=config.budget_ms,
        context_tokens=context_tokens(model),
        vocabulary_size=read_vocabulary(model).num_tokens,
    )
    return limits, PacedRunner(float(os.environ[STEP_MS_VARIABLE]) / 1000), StepTimeModel()


if __name__ == "__main__":
    engine_process.load = load
    sys.exit(engine_process.main())
