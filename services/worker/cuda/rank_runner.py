"""Ranks on devices: rank 0 leads, and is the engine's runner; the others launch what it launches."""

import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import triton

from services.worker.cuda.cuda_runner import CudaRunner, LaunchedStep
from services.worker.cuda.kv_cache import DeviceKvCache
from services.worker.engine.runner import RanksLostError
from services.worker.engine.step_plan import StepPlan, StepResult
from services.worker.engine_config import RANKS_LOST_STATUS
from services.worker.plan_ring import PlanReader, PlanWriter
from services.worker.rank_beats import RankBeats
from services.worker.rank_file import RankFile

_STEPS_IN_FLIGHT = 2
_PREPARE = StepPlan(0, ())
"""Sent to ranks in a step's place: all prepare the next part, at the same time, since what is launched for it meets."""


class LeadingRunner:
    """Rank 0: a `Runner` of the engine."""

    steps_ahead = CudaRunner.steps_ahead

    def __init__(self, runner: CudaRunner, plans: PlanWriter) -> None:
        self._runner = runner
        self._plans = plans

    @property
    def cache(self) -> DeviceKvCache:
        """This rank's part of the cache."""
        return self._runner.cache

    def launch(self, plan: StepPlan) -> "LedStep":
        """Begin a step on all ranks. Raises RanksLostError."""
        self._plans.send(plan)
        with _of_lost_ranks(self._plans):
            return LedStep(self._plans, self._runner.launch(plan))

    def prepare(self) -> bool:
        """Have all ranks do the same part. Raises RanksLostError."""
        if not self._runner.may_prepare:
            return False
        self._plans.send(_PREPARE)
        with _of_lost_ranks(self._plans):
            return self._runner.prepare()


@dataclass(frozen=True, slots=True)
class LedStep:
    """A step that all ranks compute."""

    plans: PlanWriter
    launched: LaunchedStep

    def is_done(self) -> bool:
        """Whether this rank's device has done it."""
        with _of_lost_ranks(self.plans):
            return self.launched.is_done()

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Raises RanksLostError and RanksDisagreeError."""
        with _of_lost_ranks(self.plans):
            return self.launched.result()


@contextmanager
def _of_lost_ranks(plans: PlanWriter) -> Iterator[None]:
    """A device has an error when it stores into the memory of a rank that is gone: that is no step's fault."""
    try:
        yield
    except RuntimeError as error:
        if plans.is_a_rank_gone():
            raise RanksLostError(f"another rank is gone: {error}") from error
        raise


def follow(runner: CudaRunner, plans: PlanReader) -> None:
    """Launch what rank 0 plans, until it or the front is gone. Raises RanksLostError and RanksDisagreeError."""
    launched: deque[LaunchedStep] = deque()
    while plan := plans.take():
        if plan == _PREPARE:
            runner.prepare()
            continue
        if len(launched) == _STEPS_IN_FLIGHT:
            launched.popleft().result()
        launched.append(runner.launch(plan))


def watch_ranks(file: RankFile) -> RankBeats | None:
    """End this process as soon as another rank stands still: what waits for a device cannot be interrupted.

    Where devices are pretended, ranks are slow, not lost: nobody watches.
    """
    if triton.knobs.runtime.interpret:
        return None

    def end(lost: int) -> None:
        print(f"engine: rank {lost} stands still", file=sys.stderr, flush=True)
        os._exit(RANKS_LOST_STATUS)

    beats = RankBeats(file.beats, file.rank, file.world_size)
    beats.start(end)
    return beats
