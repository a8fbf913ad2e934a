"""The seam between planning and computing: the loop knows a runner only by this."""

from typing import Protocol

from services.worker.engine.step_plan import StepPlan, StepResult


class RanksLostError(Exception):
    """A rank of a sharded worker did not come: it is gone, or stands still."""


class RanksDisagreeError(Exception):
    """Ranks computed different things, or different steps: what they have in their caches cannot be trusted."""


class RunningStep(Protocol):
    """A step that was launched."""

    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        ...

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Called once."""
        ...


class Runner(Protocol):
    """Computes steps over a paged KV cache: in this process, on a GPU, or on several ranks at once."""

    steps_ahead: int
    """Steps that may be launched while one before them runs: 0 or 1."""

    def launch(self, plan: StepPlan) -> RunningStep:
        """Begin a step and return, on a GPU before it is done.

        Steps run in order of launch. An exception, here or in `result`, ends the engine: the cache's content is
        unknown after it.
        """
        ...

    def prepare(self) -> bool:
        """Do a part, of some 100 ms at most, of what makes later steps faster. False: nothing is left to do.

        Called while no step runs, and nothing else is to be done.
        """
        ...
