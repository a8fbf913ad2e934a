"""What a leader tells of its decisions: figures, and spans in the traces of requests."""

import time
from dataclasses import dataclass

from services.common.store.inbox import Outstanding
from services.common.store.intake import Queued
from services.common.telemetry.conventions import ATTEMPT, WORKER
from services.common.telemetry.tracing import Attributes, Tracer, ns_of_ms
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.placement import Placement


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Of one scheduler process, over all its reigns."""

    metrics: SchedulerMetrics
    tracer: Tracer

    def placed(self, placement: Placement, took_ms: float) -> None:
        """A request was given to a worker just now, by a script that took so long."""
        self.metrics.placements.inc()
        self.metrics.placement_duration.observe(took_ms / 1000)
        if not self.tracer.enabled:
            return
        queued = placement.queued
        asked_at_ns = time.time_ns() - round(took_ms * 1e6)
        attempt = {ATTEMPT: queued.attempt.number}
        waited = self.tracer.begin("queue", queued.traceparent, attempt, at_ns=ns_of_ms(_entered_at_ms(queued)))
        waited.end(at_ns=asked_at_ns)
        attributes: Attributes = {**attempt, WORKER: placement.worker}
        self.tracer.begin("placement", queued.traceparent, attributes, at_ns=asked_at_ns).end()

    def requeued(self, lost: Outstanding, worker: str, took_ms: float) -> None:
        """A request was taken from a lost worker just now, by a script that took so long."""
        self.metrics.requeues.labels("worker_lost").inc()
        if self.tracer.enabled:
            asked_at_ns = time.time_ns() - round(took_ms * 1e6)
            attributes: Attributes = {ATTEMPT: lost.attempt.number, WORKER: worker}
            self.tracer.begin("requeue", lost.traceparent, attributes, at_ns=asked_at_ns).end(error="worker_lost")


def _entered_at_ms(queued: Queued) -> int:
    """When it came into the queue, at first or again: Redis' time is the first part of an entry's id."""
    return int(queued.entry_id.partition("-")[0])
