"""Which workers are lost: those that have work and make no progress (docs/protocol.md, "Time"; ADR 5 and 8).

A worker that only waits is never lost by silence; its registration expires instead. A gateway's hint that its stream
from a worker broke only shortens the patience with its silence: whoever reports on is not lost by it. A stall of the
observer, or of its link, is not a death of the observed: after one, all timers start again, and nobody is judged before
the events that came meanwhile are read.
"""

from dataclasses import dataclass

from gen.shoal.fleet.v1.request_pb2 import WorkerReport
from services.common.ids import WorkerId

HINTED_INTERVALS = 1.5
"""Intervals of a worker's reports in which one must come after a hint."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the leader waits for progress. All in ms, but for `steps`."""

    least_ms: float = 1_000
    steps: float = 8
    """Times the predicted length of the step in flight."""
    held_ms: float = 10_000
    """For a worker that reports requests and no step in flight: attempts that wait for their gateway's answer, or for
    the form of theirs to be compiled."""
    stall_ms: float = 500
    """A wake-up that is later than this is a stall of the observer."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that is lost, and for how long it had made no progress."""

    worker: WorkerId
    silent_ms: float
    hinted: bool = False
    """A gateway had hinted at it."""


@dataclass(slots=True)
class _Watch:
    busy: bool
    reported_at_ms: float
    progressed_at_ms: float
    steps: int = -1
    predicted_step_ms: int = 0
    waits: bool = False
    """The last report said: requests taken, no step in flight."""
    hinted_at_ms: float | None = None
    """Since when a gateway's hint waits for a report."""
    hinted_ms: float = 0.0
    """How long it does."""


class Liveness:
    """One timer a worker. Changed only by the leader's task; `now_ms` is always the leader's own clock."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._watches: dict[WorkerId, _Watch] = {}
        self._behind = False

    def watch(self, worker: WorkerId, busy: bool, now_ms: float) -> None:
        """Know a worker. `busy`: it has work. When work begins, its timer starts."""
        watch = self._watches.get(worker)
        if watch is None:
            self._watches[worker] = _Watch(busy, now_ms, now_ms)
            return
        if busy and not watch.busy:
            _restart(watch, now_ms)
            watch.predicted_step_ms, watch.waits = 0, False  # of steps long past
        watch.busy = busy

    def forget(self, worker: WorkerId) -> None:
        """Stop watching a worker."""
        self._watches.pop(worker, None)

    def reported(self, report: WorkerReport, now_ms: float) -> None:
        """Take in a report. It is progress if steps were made since the last one."""
        watch = self._watches.get(WorkerId(report.worker_id))
        if watch is None:
            return
        watch.reported_at_ms = now_ms
        watch.hinted_at_ms = None
        watch.predicted_step_ms = report.predicted_step_ms
        watch.waits = report.requests > 0 and report.predicted_step_ms == 0
        if report.steps > watch.steps:
            watch.progressed_at_ms = now_ms
            watch.steps = report.steps

    def hinted(self, worker: WorkerId, report_interval_ms: float, now_ms: float) -> None:
        """A gateway's stream from a worker broke: one report may be late, but not two. A second hint changes nothing.

        `report_interval_ms`: the worker's own longest; 0: it is not known, and the hint says nothing.
        """
        watch = self._watches.get(worker)
        if watch is not None and watch.hinted_at_ms is None and report_interval_ms:
            watch.hinted_at_ms, watch.hinted_ms = now_ms, HINTED_INTERVALS * report_interval_ms

    def woke(self, now_ms: float, expected_at_ms: float) -> None:
        """The leader's loop runs again, and should have by `expected_at_ms`. Too late: it, or its link, had stalled."""
        late_ms = now_ms - expected_at_ms
        if late_ms > self._patience.stall_ms:
            self._behind = True
        elif late_ms > 0:
            # A hint's patience is shorter than a stall: it counts only the time in which reports could be read.
            for watch in self._watches.values():
                if watch.hinted_at_ms is not None:
                    watch.hinted_at_ms += late_ms

    def caught_up(self, now_ms: float) -> None:
        """All events there are have been read. After a stall, timers start again now."""
        if self._behind:
            self._behind = False
            for watch in self._watches.values():
                _restart(watch, now_ms)

    def lost(self, now_ms: float) -> list[Loss]:
        """Workers that have work and have made no progress for too long."""
        if self._behind:
            return []
        losses = []
        for worker, watch in self._watches.items():
            if watch.busy and now_ms >= self._due_at_ms(watch):
                silent_ms = now_ms - min(watch.progressed_at_ms, watch.reported_at_ms)
                losses.append(Loss(worker, silent_ms, hinted=watch.hinted_at_ms is not None))
        return losses

    def next_due_ms(self) -> float | None:
        """When the next worker is lost, if nothing is heard. None: none has work."""
        return min((self._due_at_ms(watch) for watch in self._watches.values() if watch.busy), default=None)

    def _due_at_ms(self, watch: _Watch) -> float:
        limit_ms = max(self._patience.least_ms, self._patience.steps * watch.predicted_step_ms)
        held_ms = max(limit_ms, self._patience.held_ms) if watch.waits else limit_ms
        # Reports come from the front, whatever its engine does: how long a step takes does not excuse their absence.
        due_at_ms = min(watch.reported_at_ms + self._patience.least_ms, watch.progressed_at_ms + held_ms)
        return due_at_ms if watch.hinted_at_ms is None else min(due_at_ms, watch.hinted_at_ms + watch.hinted_ms)


def _restart(watch: _Watch, now_ms: float) -> None:
    watch.reported_at_ms = watch.progressed_at_ms = now_ms
    if watch.hinted_at_ms is not None:
        watch.hinted_at_ms = now_ms
