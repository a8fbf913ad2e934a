"""What a scheduler counts. A follower shows that it does not lead, and zeros."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.telemetry.metrics import Metrics
from services.scheduler.ledger import Account
from services.scheduler.view import View


class SchedulerMetrics:
    """Figures of one scheduler process, over all its reigns. Counted on its event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._view: View | None = None
        self.placements = metrics.counter("shoal_placements", "Requests that were given to a worker.")
        self.placement_duration = metrics.histogram(
            "shoal_placement_duration_seconds", "The script in Redis that gives one request to a worker."
        )
        self.requeues = metrics.counter("shoal_requeues", "Requests that were taken from a worker, by why.", ["reason"])
        self.workers_lost = metrics.counter("shoal_workers_lost", "Workers that were declared lost.")
        self._reigns = metrics.counter("shoal_reigns", "Times that this process became the leader.")
        self._gauges(metrics)

    @contextmanager
    def reign(self, view: View) -> Iterator[None]:
        """This process leads, and this is what it knows, until the block is left."""
        self._reigns.inc()
        self._view = view
        try:
            yield
        finally:
            self._view = None

    def _gauges(self, metrics: Metrics) -> None:
        metrics.gauge("shoal_leader", "1 if this process leads its pool, else 0.", lambda: self._view is not None)
        metrics.gauge("shoal_queued_requests", "Requests that wait for a worker.", self._num_queued)
        metrics.gauge("shoal_workers", "Workers that the leader knows.", self._sum(lambda _: 1))
        metrics.gauge("shoal_workers_wanted", "Workers that the pool needs, as KEDA is told.", self._num_wanted)
        metrics.gauge(
            "shoal_placed_requests", "Requests that workers have.", self._sum(lambda account: len(account.reservations))
        )
        metrics.gauge(
            "shoal_pool_kv_blocks", "KV blocks of all workers.", self._sum(lambda account: account.info.num_blocks)
        )
        metrics.gauge(
            "shoal_reserved_kv_blocks",
            "KV blocks that are reserved for placed requests.",
            self._sum(lambda account: account.num_reserved_blocks),
        )

    def _num_queued(self) -> int:
        view = self._view
        return len(view.queue) if view else 0

    def _num_wanted(self) -> int:
        view = self._view
        return view.workers_wanted if view else 0

    def _accounts(self) -> list[Account]:
        # Copied in one step, for the leader's thread goes on changing it.
        view = self._view
        return list(view.ledger.accounts.values()) if view else []

    def _sum(self, of: Callable[[Account], int]) -> Callable[[], int]:
        return lambda: sum(of(account) for account in self._accounts())
