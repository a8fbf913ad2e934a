"""Which workers are lost: those that have work and make no progress (DESIGN 4.7).

A worker that only waits is never lost by silence; its registration expires instead. A stall of the observer, or of its
link, is not a death of the observed: after one, all timers start again, and nobody is judged before the events that
came meanwhile are read.
"""

from dataclasses import dataclass

from gen.shoal.fleet.v1.request_pb2 import WorkerReport
from services.common.ids import WorkerId


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the leader waits for progress. All in ms, but for `steps`."""

    least_ms: float = 1_000
    steps: float = 8
    """Times the predicted length of the step in flight."""
    held_ms: float = 10_000
    """For a worker that reports requests and no step in flight: attempts that wait for their gateway's answer."""
    stall_ms: float = 500
    """A wake-up that is later than this is a stall of the observer."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that is lost, and for how long it had made no progress."""

    worker: WorkerId
    silent_ms: float


@dataclass(slots=True)
class _Watch:
    busy: bool
    reported_at_ms: float
    progressed_at_ms: float
    steps: int = -1
    predicted_step_ms: int = 0
    waits: bool = False
    """The last report said: requests taken, no step in flight."""


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
        watch.predicted_step_ms = report.predicted_step_ms
        watch.waits = report.requests > 0 and report.predicted_step_ms == 0
        if report.steps > watch.steps:
            watch.progressed_at_ms = now_ms
            watch.steps = report.steps

    def woke(self, now_ms: float, expected_at_ms: float) -> None:
        """The leader's loop runs again, and should have by `expected_at_ms`. Too late: it, or its link, had stalled."""
        if now_ms - expected_at_ms > self._patience.stall_ms:
            self._behind = True

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
                losses.append(Loss(worker, now_ms - min(watch.progressed_at_ms, watch.reported_at_ms)))
        return losses

    def next_due_ms(self) -> float | None:
        """When the next worker is lost, if nothing is heard. None: none has work."""
        return min((self._due_at_ms(watch) for watch in self._watches.values() if watch.busy), default=None)

    def _due_at_ms(self, watch: _Watch) -> float:
        limit_ms = max(self._patience.least_ms, self._patience.steps * watch.predicted_step_ms)
        held_ms = max(limit_ms, self._patience.held_ms) if watch.waits else limit_ms
        # Reports come from the front, whatever its engine does: how long a step takes does not excuse their absence.
        return min(watch.reported_at_ms + self._patience.least_ms, watch.progressed_at_ms + held_ms)


def _restart(watch: _Watch, now_ms: float) -> None:
    watch.reported_at_ms = watch.progressed_at_ms = now_ms
