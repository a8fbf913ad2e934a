"""How long a step will take, learned from the steps before."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.worker.engine.size_factors import SizeFactors
from services.worker.engine.step_plan import SequenceChunk, StepPlan

# A step keeps this share of its weight with each later one: the last hundred or so count.
MEMORY = 0.99
# The machine's pace against the fit is that of the last ten or so: a busy neighbour comes and goes faster than the fit.
PACE_MEMORY = 0.9
FASTER_LAUNCH_SHARE = 0.5
"""Of what a launch was faster than those before, so much is believed at once."""
HOST_BOUND = 1.1
"""A step that took less than so many times its launch waited for the host."""
_ANY_NUMBER = 1 << 30


class StepTimeCoefficients(NamedTuple):
    """A step's ms = fixed_ms + ms_per_token * tokens + ms_per_attended_token * attended tokens + ms_per_scored_token *
    scored tokens."""

    fixed_ms: float = 30.0
    ms_per_token: float = 1.0
    ms_per_attended_token: float = 0.0005
    ms_per_scored_token: float = 1.0


INITIAL = StepTimeCoefficients()
"""The default model, or a smaller one, on a CPU of two cores."""
_INITIAL_WEIGHTS = 135e6
ON_A_GPU = StepTimeCoefficients(fixed_ms=4.0, ms_per_token=0.02, ms_per_attended_token=1e-6, ms_per_scored_token=0.005)
"""An 8B model on one H200."""


def on_a_cpu(num_weights: int) -> StepTimeCoefficients:
    """Return what to think of a model's steps on a CPU before the first: in proportion to its weights.

    Thought to be far shorter than they are, the first would be taken for one that stands still, on every worker.
    """
    scale = max(1.0, num_weights / _INITIAL_WEIGHTS)
    return StepTimeCoefficients(*(scale * coefficient for coefficient in INITIAL))


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step's time depends on, while it is being planned."""

    num_tokens: int
    num_attended_tokens: int
    num_prefill_tokens: int = 0
    """Of num_tokens, those of prefill chunks."""
    num_scored_tokens: int = 0

    @classmethod
    def of(cls, decodes: Iterable[SequenceChunk]) -> "StepWork":
        """Add up decodes."""
        chunks = list(decodes)
        scored = sum(len(chunk.scored_token_ids) for chunk in chunks)
        return cls(len(chunks), sum(chunk.num_attended_tokens for chunk in chunks), num_scored_tokens=scored)

    def with_prefill(self, chunk: SequenceChunk) -> "StepWork":
        """Add a prefill chunk."""
        return StepWork(
            self.num_tokens + len(chunk.token_ids),
            self.num_attended_tokens + chunk.num_attended_tokens,
            self.num_prefill_tokens + len(chunk.token_ids),
            self.num_scored_tokens + len(chunk.scored_token_ids),
        )


class StepTimeModel:
    """Predicts a step's time; fitted to the time that steps took.

    Least squares on relative errors with exponentially forgotten steps, held to the coefficients it began with as if
    those had been measured once: so a thousand equal decode steps do not make it forget what prefill costs. On top, the
    ratio of the last steps to the fit.

    A device's step with prompts takes at least as long as the host takes to launch its kernels one by one. One that
    took no longer says nothing of the device, and so is not fitted; and what is computed meanwhile costs nothing. Steps
    with prompts that are filled up count as what they are filled up to, and each size has a factor in place of the
    ratio. Only its owner, the loop, changes it.
    """

    def __init__(self, initial: StepTimeCoefficients = INITIAL, filled_up_to: Sequence[int] = ()) -> None:
        """`filled_up_to`: as of `EngineLimits`."""
        self._initial = initial
        self._factors = SizeFactors(filled_up_to)
        # Normal equations in units of the initial coefficients, where every one of them is 1.
        self._products = [[0.0] * len(initial) for _ in initial]
        self._targets = [0.0] * len(initial)
        self._coefficients = initial
        self._pace = 1.0
        self._launch_ms = 0.0

    @property
    def coefficients(self) -> StepTimeCoefficients:
        """What is predicted by now, the machine's pace included."""
        return StepTimeCoefficients(*(self._pace * coefficient for coefficient in self._coefficients))

    @property
    def launch_ms(self) -> float:
        """What the host takes to launch a step with prompts, ms; 0: nothing is launched."""
        return self._launch_ms

    def predict_ms(self, plan: StepPlan) -> float:
        """Return the expected time of a step, ms."""
        size = self._size_of(plan)
        pace = self._pace if size is None else self._factors.factor(size)
        return max(pace * self._fitted_ms(plan), self._launch_ms if plan.has_prefill else 0.0)

    def tokens_within(self, budget_ms: float, work: StepWork, first_position: int, are_scored: bool) -> int:
        """Return how many tokens of a sequence, from a position on, fit into a step of some work within a time.

        No more than fill it up: those that are left over would cost as much as many more.
        """
        budget_ms = max(budget_ms, self._launch_ms)
        within = self._within(budget_ms, work, first_position, are_scored)
        sizes = self._factors.sizes
        if not sizes or work.num_tokens > sizes[-1]:
            return within
        for size in reversed(sizes):
            more = size - work.num_tokens
            if more > 0 and self._filled_ms(size, work, first_position, are_scored) <= budget_ms:
                return max(more, within) if size == sizes[-1] else more
        # What the step has is computed with the rows that fill it up: also if there is no time for more.
        is_begun = within > 0 or work.num_prefill_tokens > 0
        return (self._factors.filled(work.num_tokens) or 0) - work.num_tokens if is_begun else 0

    def _within(self, budget_ms: float, work: StepWork, first_position: int, are_scored: bool) -> int:
        """The same of a step that is not filled up.

        The largest t with fixed + a * (tokens + t) + b * (attended + t * first_position + t * (t + 1) / 2) +
        c * (scored + t, if they are) within it.
        """
        fixed_ms, per_token, per_attended, per_scored = self._coefficients
        left_ms = budget_ms / self._pace - fixed_ms - per_token * work.num_tokens
        left_ms -= per_attended * work.num_attended_tokens + per_scored * work.num_scored_tokens
        if left_ms <= 0:
            return 0
        slope = per_token + are_scored * per_scored + per_attended * (first_position + 0.5)
        if slope == 0:
            return _ANY_NUMBER
        # The positive root of b/2 t^2 + slope t = left, in the form that has no difference of near numbers.
        return min(_ANY_NUMBER, int(2 * left_ms / (slope + math.sqrt(slope * slope + 2 * per_attended * left_ms))))

    def observe(self, plan: StepPlan, took_ms: float, launch_ms: float = 0.0) -> None:
        """Learn from a step. A few microseconds, whatever the plan's size.

        `launch_ms`: what the host took to launch it, if it is a device's.
        """
        took_ms = max(took_ms, 0.001)
        if plan.has_prefill and launch_ms > 0:
            self._observe_launch(launch_ms)
            if took_ms < HOST_BOUND * launch_ms:
                return
        ratio = took_ms / max(self._fitted_ms(plan), 0.001)
        size = self._size_of(plan)
        if size is None:
            self._pace += (1 - PACE_MEMORY) * (ratio - self._pace)
        else:
            self._factors.observe(size, ratio)
        self._fit(plan, took_ms)

    def _observe_launch(self, launch_ms: float) -> None:
        """Sooner down than up: a launch in which a library is loaded waits for the device, a hundred times as long."""
        known_ms = self._launch_ms or launch_ms
        difference_ms = min(launch_ms, 2 * known_ms) - known_ms
        self._launch_ms = known_ms + difference_ms * (1 - PACE_MEMORY if difference_ms > 0 else FASTER_LAUNCH_SHARE)

    def _filled_ms(self, size: int, work: StepWork, first_position: int, are_scored: bool) -> float:
        """What a step of some work takes that a sequence fills up."""
        fixed_ms, per_token, per_attended, per_scored = self._coefficients
        more = size - work.num_tokens
        num_attended = work.num_attended_tokens + more * first_position + more * (more + 1) // 2
        num_scored = work.num_scored_tokens + more * are_scored
        line_ms = fixed_ms + per_token * size + per_attended * num_attended + per_scored * num_scored
        return self._factors.factor(size) * line_ms

    def _size_of(self, plan: StepPlan) -> int | None:
        """What a step is filled up to. None: it is not."""
        return self._factors.filled(plan.num_tokens) if plan.has_prefill else None

    def _features(self, plan: StepPlan) -> tuple[float, ...]:
        num_tokens = self._size_of(plan) or plan.num_tokens
        return 1.0, float(num_tokens), float(plan.num_attended_tokens), float(plan.num_scored_tokens)

    def _fitted_ms(self, plan: StepPlan) -> float:
        features = self._features(plan)
        return sum(feature * coefficient for feature, coefficient in zip(features, self._coefficients, strict=True))

    def _fit(self, plan: StepPlan, took_ms: float) -> None:
        row = [f * c / took_ms for f, c in zip(self._features(plan), self._initial, strict=True)]
        for i in range(len(row)):
            self._targets[i] = MEMORY * self._targets[i] + row[i]
            for j in range(len(row)):
                self._products[i][j] = MEMORY * self._products[i][j] + row[i] * row[j]
        held = [[value + (i == j) for j, value in enumerate(line)] for i, line in enumerate(self._products)]
        scales = _solve(held, [value + 1 for value in self._targets])
        # A negative cost is an artefact of noise: it would predict that more work takes less time.
        self._coefficients = StepTimeCoefficients(
            *(max(scale, 0.0) * c for scale, c in zip(scales, self._initial, strict=True))
        )


def _solve(matrix: list[list[float]], vector: Sequence[float]) -> list[float]:
    """Solve a symmetric, positive definite system by elimination (no pivoting is needed for such)."""
    rows = [[*line, value] for line, value in zip(matrix, vector, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
    solution = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, len(rows)))
        solution[i] = (rows[i][-1] - known) / rows[i][i]
    return solution
