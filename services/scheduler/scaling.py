"""The leader's look at demand: how much work there is, and so how many workers are wanted; told about once a second."""

import asyncio
import logging
from typing import NoReturn

from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from gen.shoal.fleet.v1.request_pb2 import WorkerInfo
from services.common.store.demand import Told
from services.scheduler.clock import Clock
from services.scheduler.demand import Bounds, Demand, Load, Offered, Startup
from services.scheduler.deposed import Deposed
from services.scheduler.ledger import Reservation
from services.scheduler.pool_store import PoolStore
from services.scheduler.view import View
from services.scheduler.work import AnswerLengths, Pace, mean_step_time, smallest

logger = logging.getLogger(__name__)

LEFT_OF_RUNNING = 0.5
"""Of a request that runs: the leader does not follow its tokens, and over many the mean is this."""


class Scaling:
    """What one reign thinks of demand. It reads the view, and takes from it what arrived."""

    def __init__(self, view: View, bounds: Bounds, told: Told | None, now_ms: float) -> None:
        """`told`: the last leader's word: what it wanted if that is fresh, and what it knew of workers, gone or not."""
        last = told.demand if told else PoolDemand()
        self._view = view
        view.arrived.clear()  # It waits, and counts as such.
        fresh = told is not None and told.age_ms <= bounds.quiet_ms
        self._demand = Demand(bounds, last.workers_wanted if fresh else self._num_ready, now_ms)
        self._lengths = AnswerLengths(last.choice_tokens)
        self._startup = Startup(last.startup_ms)
        self._offered = Offered(bounds.quiet_ms, now_ms)
        self._smallest = last.smallest_worker if last.HasField("smallest_worker") else None
        self._step_time = last.step_time if last.HasField("step_time") else None
        self._pace: Pace | None = None
        """None: no worker has told yet what its steps take."""

    def look(self, now_ms: float) -> PoolDemand:
        """Take all in, and decide. O(requests), a few microseconds each."""
        self._learn()
        waiting = [Reservation.of(queued) for queued in self._view.queue.in_order()]
        running = [reservation for _, reservation in self._view.ledger.holdings()]
        arrived = [Reservation.of(queued) for queued in self._view.arrived]
        self._view.arrived.clear()
        load = Load(
            num_requests=len(waiting) + len(running),
            work_ms=self._work_ms(waiting) + LEFT_OF_RUNNING * self._work_ms(running),
            occupied=self._occupied(running),
            offered=self._offered.look(self._work_ms(arrived), now_ms),
            ready=self._num_ready,
            startup_ms=self._startup.mean_ms,
        )
        wanted = self._demand.look(load, now_ms)
        self._startup.look(wanted, load.ready, now_ms)
        return self._told(load, wanted, len(waiting))

    def _learn(self) -> None:
        accounts = self._view.ledger.accounts.values()
        self._step_time = mean_step_time(accounts, self._step_time)
        self._lengths.look(account.report for account in accounts)
        if accounts:
            self._smallest = _least_room([account.info for account in accounts])
        if self._step_time and self._smallest:
            self._pace = Pace.of(self._step_time, self._smallest)

    def _work_ms(self, requests: list[Reservation]) -> float:
        pace = self._pace
        if pace is None:
            return 0.0
        return sum(pace.request_ms(needs, self._lengths.expected_tokens(needs)) for needs in requests)

    def _occupied(self, running: list[Reservation]) -> float:
        return sum(self._pace.share(needs) for needs in running) if self._pace else 0.0

    @property
    def _num_ready(self) -> int:
        return sum(not account.info.draining for account in self._view.ledger.accounts.values())

    def _told(self, load: Load, wanted: int, num_waiting: int) -> PoolDemand:
        return PoolDemand(
            workers_wanted=wanted,
            workers_ready=load.ready,
            waiting_requests=num_waiting,
            running_requests=load.num_requests - num_waiting,
            work_ms=round(load.work_ms),
            startup_ms=round(load.startup_ms),
            choice_tokens=self._lengths.mean_tokens,
            step_time=self._step_time,
            smallest_worker=self._smallest,
        )


async def keep_telling(
    store: PoolStore, fence: str, view: View, bounds: Bounds, look_ms: int, clock: Clock
) -> NoReturn:
    """Look at demand every `look_ms` of a reign, and tell it. Raises Deposed, StoreError."""
    scaling = Scaling(view, bounds, await store.demand.read(), clock())
    last_wanted = None
    while True:
        told = scaling.look(clock())
        if not await store.demand.tell(told, fence):
            raise Deposed("its word on demand was refused")
        view.workers_wanted = told.workers_wanted
        if told.workers_wanted != last_wanted:
            last_wanted = told.workers_wanted
            logger.info(
                "workers wanted",
                extra={
                    "wanted": told.workers_wanted,
                    "ready": told.workers_ready,
                    "waiting": told.waiting_requests,
                    "running": told.running_requests,
                    "work_ms": told.work_ms,
                },
            )
        await asyncio.sleep(look_ms / 1000)


def _least_room(workers: list[WorkerInfo]) -> WorkerInfo:
    """The smallest worker, with the shortest context of any: what fits this fits all."""
    least = WorkerInfo()
    least.CopyFrom(smallest(workers))
    least.context_tokens = min(worker.context_tokens for worker in workers)
    return least
