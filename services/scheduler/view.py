"""What the leader knows of its pool: who waits, what each worker has, who makes progress. No input or output here.

All of it is rebuilt from Redis at the start of a reign, and kept up by what the intake and the events bring.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gen.shoal.fleet.v1.request_pb2 import LinkBroken, WorkerInfo, WorkerReport
from services.common.ids import NO_WORKER, RequestKey, WorkerId
from services.common.record.record import Attempt
from services.common.record.states import ENDED, ON_WORKER
from services.common.store.events import Event
from services.common.store.intake import Queued
from services.common.store.requests import Peek
from services.scheduler.deadlines import Deadlines
from services.scheduler.ledger import Ledger, Reservation
from services.scheduler.liveness import Liveness, Patience
from services.scheduler.ordering import Queue
from services.scheduler.placement import Placement, next_placement

MOST_ARRIVED = 10_000


@dataclass(frozen=True, slots=True)
class Live:
    """A request that has not ended, as far as the leader knows. `worker` is NO_WORKER while it waits."""

    key: RequestKey
    attempt: Attempt
    worker: WorkerId


class View:
    """Changed only by the tasks of one reign, and only between awaits."""

    def __init__(self, patience: Patience) -> None:
        self.queue = Queue()
        self.ledger = Ledger()
        self.liveness = Liveness(patience)
        self.deadlines = Deadlines()
        self.arrived: deque[Queued] = deque(maxlen=MOST_ARRIVED)
        """New requests since somebody last looked at demand, who clears it."""
        self.workers_wanted = 0
        """As last told."""

    def knows(self, worker: WorkerId) -> bool:
        """Whether this worker has an account."""
        return worker in self.ledger.accounts

    def add_worker(self, info: WorkerInfo, outstanding: Iterable[Reservation], now_ms: float) -> None:
        """Know a worker and what it has; of a known one, only what it says of itself is taken anew."""
        self.ledger.open(info, outstanding)
        self._watch(WorkerId(info.worker_id), now_ms)

    def forget_worker(self, worker: WorkerId) -> None:
        """A worker is gone, or declared lost: nothing is placed there any more."""
        self.ledger.close(worker)
        self.liveness.forget(worker)

    def take_queued(self, queued: Queued) -> None:
        """An entry of the intake."""
        self.queue.add(queued)
        if queued.attempt.number == 1:
            self.arrived.append(queued)
        if queued.deadline_at_ms:
            self.deadlines.add(queued.key, queued.deadline_at_ms)

    def take_event(self, event: Event, now_ms: float) -> WorkerId | None:
        """An entry of the events. Returns a worker that reports and is not known.

        `WorkerReport.released` is not obeyed: Redis says the same, in the very step in which a request leaves a
        worker; the report comes later, when the request may be placed on that worker again.
        """
        if isinstance(event, WorkerReport):
            worker = WorkerId(event.worker_id)
            self.ledger.reported(event)
            self.liveness.reported(event, now_ms)
            return None if self.knows(worker) else worker
        if isinstance(event, LinkBroken):
            account = self.ledger.accounts.get(WorkerId(event.worker_id))
            if account is not None:
                self.liveness.hinted(account.worker, account.info.report_interval_ms, now_ms)
        elif self.ledger.release(event.worker, event.key):
            self._watch(event.worker, now_ms)
        return None

    def traceparent(self, key: RequestKey) -> str:
        """The trace of a request that waits, or that a worker has; empty if it is not known. O(workers)."""
        queued = self.queue.get(key)
        if queued is not None:
            return queued.traceparent
        held = (account.reservations.get(key) for account in self.ledger.accounts.values())
        return next((reservation.traceparent for reservation in held if reservation), "")

    def next_placement(self) -> Placement | None:
        """What to place now. None: nobody waits, or there is no room."""
        return next_placement(self.queue.in_order(), self.ledger.accounts.values())

    def placed(self, placement: Placement, now_ms: float) -> None:
        """Redis has placed it."""
        self.queue.drop(placement.queued.key, placement.queued.attempt)
        self.ledger.reserve(placement.worker, placement.reservation)
        self._watch(placement.worker, now_ms)

    def found(self, worker: WorkerId, reservation: Reservation, now_ms: float) -> None:
        """The worker's inbox has a request: it is counted there, room or not, unless it is already."""
        self.ledger.take(worker, reservation)
        self._watch(worker, now_ms)

    def live(self) -> list[Live]:
        """Every request that is known not to have ended."""
        queued = [Live(queued.key, queued.attempt, NO_WORKER) for queued in self.queue.in_order()]
        return queued + [Live(held.key, held.attempt, worker) for worker, held in self.ledger.holdings()]

    def agrees(self, live: Live, peek: Peek) -> bool:
        """Whether Redis has a request under the same attempt at the same place.

        One that is taken for waiting and that a worker has agrees too: its placement is under way here, or an earlier
        one was not heard of, which the next try to place it finds out.
        """
        if peek.attempt != live.attempt:
            return False
        if live.worker == NO_WORKER:
            return peek.state not in ENDED
        return peek.state in ON_WORKER and peek.worker == live.worker

    def forget(self, live: Live, now_ms: float) -> None:
        """Redis does not agree, and it is right. What replaced this attempt comes by the intake."""
        if live.worker == NO_WORKER:
            self.queue.drop(live.key, live.attempt)
        elif self._holds(live) and self.ledger.release(live.worker, live.key):
            self._watch(live.worker, now_ms)

    def _holds(self, live: Live) -> bool:
        account = self.ledger.accounts.get(live.worker)
        held = account.reservations.get(live.key) if account else None
        return held is not None and held.attempt == live.attempt

    def _watch(self, worker: WorkerId, now_ms: float) -> None:
        self.liveness.watch(worker, not self.ledger.accounts[worker].idle, now_ms)
