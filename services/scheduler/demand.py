"""How many workers are wanted: the pool's work, over the time in which it shall be done (ADR 17). Pure.

Up at once, down only after a quiet time: what is added too early costs a little, what is missing costs every caller.
"""

import math
from collections import deque
from dataclasses import dataclass

TOLERANCE = 0.1
"""A worker is not added for a smaller part of one, nor taken away while as much of it is needed: noise at the border of
two numbers changes nothing."""
BUSY = 0.85
"""Part of its time that a worker shall be busy under steady work: at 1, random arrivals would queue without end. In the
traces of `tests/unit/test_scheduler_demand.py` workers came and went up to ten times as often without it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an operator allows."""

    least: int
    """0: none while there is nothing to do."""
    most: int
    within_ms: float
    """Time in which all that was accepted shall be done: the objective."""
    quiet_ms: float
    """How long fewer workers must have been enough before any is given up."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool has to do, as seen at one moment. Work is in ms of one full worker."""

    num_requests: int
    """Waiting and running."""
    work_ms: float = 0.0
    """What is left to do of all of them. With requests and without work, the pool's pace is not known yet."""
    occupied: float = 0.0
    """Workers that what runs would fill, packed tightly."""
    offered: float = 0.0
    """Work that comes in a ms, over the last while: as many workers are busy all the time."""
    ready: int = 0
    """Workers that take requests."""
    startup_ms: float = 0.0
    """Until one more of them does."""


def workers_needed(load: Load, within_ms: float) -> float:
    """Workers that do this in time; a part of one counts. 0 only if there is nothing to do.

    What the ready ones will not have done within the objective is for new ones, who begin when they have started. Where
    starting takes longer than half of it, they are given half of it: so no more than twice as many are asked for.
    """
    done_ms = load.ready * within_ms
    if load.work_ms <= done_ms:
        for_work = load.work_ms / within_ms
    else:
        for_work = load.ready + (load.work_ms - done_ms) / max(within_ms - load.startup_ms, within_ms / 2)
    return max(for_work, load.occupied, load.offered / BUSY)


class Demand:
    """The number of workers wanted, look after look. Changed by the leader's task only."""

    def __init__(self, bounds: Bounds, wanted: int, now_ms: float) -> None:
        """`wanted`: so far, by an earlier leader's word, or as many as there are."""
        self._bounds = bounds
        self.wanted = min(max(wanted, bounds.least), bounds.most)
        """Workers wanted. The one figure: metrics and scalers tell this."""
        self._enough: deque[tuple[float, int]] = deque()
        """At earlier looks within the quiet time: how many would have been enough, falling: later ones hide smaller."""
        self._began_ms = now_ms

    def look(self, load: Load, now_ms: float) -> int:
        """Take in the load, and return how many workers are wanted. Amortised O(1)."""
        needed = workers_needed(load, self._bounds.within_ms)
        some = 1 if load.num_requests else 0
        missing = max(math.ceil(needed - TOLERANCE), math.ceil(load.occupied), some)
        enough = max(math.ceil(needed + TOLERANCE), missing) if load.num_requests else 0
        lowest = self._highest_of_late(enough, now_ms)
        if missing > self.wanted:
            self.wanted = missing
        elif lowest < self.wanted and now_ms - self._began_ms >= self._bounds.quiet_ms:
            self.wanted = lowest
        self.wanted = min(max(self.wanted, self._bounds.least), self._bounds.most)
        return self.wanted

    def _highest_of_late(self, enough: int, now_ms: float) -> int:
        while self._enough and self._enough[-1][1] <= enough:
            self._enough.pop()
        self._enough.append((now_ms, enough))
        while self._enough[0][0] < now_ms - self._bounds.quiet_ms:
            self._enough.popleft()
        return self._enough[0][1]


class Offered:
    """Work that comes in a ms, as a mean that forgets. Changed by the leader's task only."""

    def __init__(self, over_ms: float, now_ms: float) -> None:
        """`over_ms`: what came so long ago counts 1/e."""
        self._over_ms = over_ms
        self._at_ms = now_ms
        self._work_ms = 0.0

    def look(self, work_ms: float, now_ms: float) -> float:
        """Take in the work that came since the last look."""
        self._work_ms = self._work_ms * math.exp((self._at_ms - now_ms) / self._over_ms) + work_ms
        self._at_ms = now_ms
        return self._work_ms / self._over_ms


class Startup:
    """How long a worker takes from being wanted to being ready, as seen. Changed by the leader's task only."""

    LONGEST_MS = 900_000
    """What took longer was started by hand, not because it was wanted."""
    MEMORY = 0.7

    def __init__(self, mean_ms: float = 0.0) -> None:
        """`mean_ms`: what an earlier leader had seen; 0: nothing."""
        self.mean_ms = mean_ms
        self._ready = 0
        self._missing_since_ms: deque[float] = deque()
        """One for each worker that is wanted and not ready, longest wait first."""

    def look(self, wanted: int, ready: int, now_ms: float) -> None:
        """Take in how many are wanted and ready now."""
        for _ in range(min(ready - self._ready, len(self._missing_since_ms))):
            self._learn(now_ms - self._missing_since_ms.popleft())
        self._ready = ready
        missing = max(0, wanted - ready)
        while len(self._missing_since_ms) > missing:
            self._missing_since_ms.pop()
        while len(self._missing_since_ms) < missing:
            self._missing_since_ms.append(now_ms)

    def _learn(self, took_ms: float) -> None:
        if took_ms <= self.LONGEST_MS:
            self.mean_ms = self.MEMORY * self.mean_ms + (1 - self.MEMORY) * took_ms if self.mean_ms else took_ms
