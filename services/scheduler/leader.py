"""What a leader does in its reign, top to bottom: recover, rebuild, then follow intake and events, and place.

Nothing survives a reign but Redis. Whatever goes wrong ends it, and the next one, perhaps by the same process, begins
from Redis again. Every write carries the fence of this reign, so an old leader that is late writes nothing.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import NoReturn

from gen.shoal.fleet.v1.request_pb2 import WorkerInfo
from services.common import log
from services.common.error_groups import flat
from services.common.ids import RequestKey, WorkerId, new_nonce
from services.common.record import moves
from services.common.record.transitions import Verdict
from services.common.store.connection import MAX_BLOCK_MS, StoreError
from services.common.store.events import Released
from services.common.store.inbox import Outstanding
from services.common.store.leader_feed import read_leader
from services.common.store.streams import FIRST
from services.scheduler import lease_keeper
from services.scheduler.clock import Clock
from services.scheduler.config import SchedulerConfig
from services.scheduler.deposed import Deposed
from services.scheduler.ledger import Reservation
from services.scheduler.placement import Placement
from services.scheduler.pool_store import PoolStore
from services.scheduler.recovery import recover, restore_late
from services.scheduler.scaling import keep_telling
from services.scheduler.sweeper import Sweeper
from services.scheduler.telemetry import Telemetry
from services.scheduler.view import View

logger = logging.getLogger(__name__)

READ_COUNT = 500
"""Most entries of each stream in one read."""
PLACE_COUNT = 100
"""Most placements between two reads, so that the order of the queue and the workers' room stay fresh."""
NEWEST_EVENTS = 500
"""Of these, a new leader takes each worker's last report, and what is hinted at behind it."""


@dataclass(slots=True)
class _Position:
    """Ids of the last entries read."""

    intake: str = FIRST
    events: str = FIRST


class Reign:
    """One reign. Its task alone changes the view, but for the sweeper's corrections."""

    def __init__(
        self, store: PoolStore, held: lease_keeper.Held, config: SchedulerConfig, telemetry: Telemetry, clock: Clock,
    ) -> None:  # fmt: skip
        self._store = store
        self._held = held
        self._fence = held.lease.fence
        self._config = config
        self._telemetry = telemetry
        self._clock = clock
        self.view = View(config.patience)
        """What this leader knows; for reading only."""
        self._sweeper = Sweeper(store, self._fence, self.view, clock, config.rhythm)
        self._position = _Position()
        self._next_check_ms = 0.0
        self._expired_since_ms: dict[WorkerId, float] = {}
        """When a registration was first found expired."""

    async def run(self, seen_life: bool) -> None:
        """Lead until deposed. `seen_life`: this process has met a leader before. Raises Deposed, StoreError."""
        end: BaseException | None = None
        try:
            with self._telemetry.metrics.reign(self.view):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(
                        lease_keeper.keep(self._store.leadership, self._held, self._config.term, self._clock)
                    )
                    tasks.create_task(self._lead(seen_life))
        except* (Deposed, StoreError) as group:
            end = flat(group)[0]  # whichever it is, the reign has ended
        if end is not None:
            raise end

    async def _lead(self, seen_life: bool) -> None:
        await recover(self._store, self._fence, self._config.window, self._clock, seen_life)
        await self._rebuild()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sweeper.run())
            tasks.create_task(self._follow())
            tasks.create_task(
                keep_telling(
                    self._store, self._fence, self.view, self._config.bounds, self._config.demand_look_ms, self._clock
                )
            )

    async def _rebuild(self) -> None:
        """Learn all that Redis knows. What is placed is read behind the events, so that no release is missed."""
        newest = await self._store.events.newest(NEWEST_EVENTS)
        if newest:
            self._position.events = newest[-1][0]
        await self._check_registrations()
        for _, event in newest:
            if not isinstance(event, Released):
                self.view.take_event(event, self._clock())
        while not await self._read(block_ms=0):
            pass
        logger.info(
            "rebuilt",
            extra={
                "queued": len(self.view.queue),
                "placed": sum(1 for _ in self.view.ledger.holdings()),
                "workers": len(self.view.ledger.accounts),
            },
        )
        await self._place()

    async def _follow(self) -> NoReturn:
        """Wait for something to happen, take it all in, and act on it."""
        liveness = self.view.liveness
        more = False
        while True:
            block_ms = 0 if more else self._idle_ms()
            expected_at_ms = self._clock() + block_ms
            caught_up = await self._read(block_ms)
            liveness.woke(self._clock(), expected_at_ms)
            more = not caught_up
            if caught_up:
                liveness.caught_up(self._clock())
                read_at_ms = self._clock()
                await self._lose_silent()
                more = await self._place()
                if self._clock() >= self._next_check_ms:
                    await self._check_registrations()
                    await restore_late(self._store, self._fence)
                    more = True
                liveness.woke(self._clock(), read_at_ms)

    async def _read(self, block_ms: int) -> bool:
        """Take in new entries, waiting for the first. False: there may be more already."""
        batch = await read_leader(
            self._store.redis,
            self._store.pool,
            self._position.intake,
            self._position.events,
            block_ms,
            READ_COUNT,
        )
        for entry_id, event in batch.events:
            self._position.events = entry_id
            if self.view.take_event(event, self._clock()) is not None:
                self._next_check_ms = 0.0  # somebody new
        for queued in batch.intake:
            self._position.intake = queued.entry_id
            self.view.take_queued(queued)
        return len(batch.intake) < READ_COUNT and len(batch.events) < READ_COUNT

    async def _place(self) -> bool:
        """Place as many as there is room for. True: there may be room for more."""
        for _ in range(PLACE_COUNT):
            placement = self.view.next_placement()
            if placement is None:
                return False
            await self._place_one(placement)
        return True

    async def _place_one(self, placement: Placement) -> None:
        queued, worker = placement.queued, placement.worker
        asked_at_ms = self._clock()
        answer = await self._store.requests.place(moves.Place(queued.key, self._fence, queued.attempt, worker))
        about = log.about(queued.key, queued.traceparent)
        fields = {**about, "attempt": queued.attempt.number, "worker": worker}
        match answer.verdict:
            case Verdict.OK:
                now_ms = self._clock()
                self.view.placed(placement, now_ms)
                self._telemetry.placed(placement, now_ms - asked_at_ms)
                logger.info("placed", extra=fields)
            case Verdict.NOT_LEADER:
                raise Deposed("a placement was refused")
            case Verdict.NO_WORKER:
                # What it has is found by the next looks at registrations: it left, or it will be lost.
                self.view.forget_worker(worker)
                logger.info("worker is gone", extra=fields)
            case verdict:
                self.view.queue.drop(queued.key, queued.attempt)
                logger.info("not placed", extra={**fields, "verdict": verdict})
                if verdict == Verdict.STALE:
                    await self._find(queued.key)

    async def _find(self, key: RequestKey) -> None:
        """Count what the view lacks of the worker that has a request which was taken for waiting.

        An earlier try of this leader's, under the same fence, ran after its connection had died and the inboxes had
        been read. If the request waits under another attempt instead, that comes by the intake.
        """
        (peek,) = await self._store.requests.peek([key])
        if peek is not None and self.view.knows(peek.worker):
            for start in await self._store.inbox(peek.worker).outstanding():
                self.view.found(peek.worker, Reservation.of(start), self._clock())

    async def _check_registrations(self) -> None:
        """Learn who came, who drains, who left, and whose registration expired."""
        now_ms = self._clock()
        self._next_check_ms = now_ms + self._config.registration_check_ms
        registrations = dict(await self._store.workers.all())
        for worker in [worker for worker in self.view.ledger.accounts if worker not in registrations]:
            self.view.forget_worker(worker)
            logger.info("worker left", extra={"worker": worker})
        self._expired_since_ms = {
            worker: self._expired_since_ms.get(worker, now_ms) for worker, info in registrations.items() if info is None
        }
        for worker, info in registrations.items():
            if info is not None:
                await self._know(worker, info)
            elif now_ms - self._expired_since_ms[worker] >= self._config.registration_check_ms:
                # Not at an early look, for a newcomer: when Redis was away, all are to have time to register again.
                await self._lose(worker, "worker lost: its registration expired")

    async def _know(self, worker: WorkerId, info: WorkerInfo) -> None:
        outstanding: list[Outstanding] = []
        if not self.view.knows(worker):
            outstanding = await self._store.inbox(worker).outstanding()
            logger.info("worker joins", extra={"worker": worker, "requests": len(outstanding)})
        self.view.add_worker(info, [Reservation.of(start) for start in outstanding], self._clock())

    async def _lose_silent(self) -> None:
        """Take their requests from workers that make no progress."""
        judged_at_ms = self._clock()
        # Whatever reached Redis up to now is read first: this process may have stood still since its last read.
        if not self.view.liveness.lost(judged_at_ms) or not await self._read(block_ms=0):
            return
        for loss in self.view.liveness.lost(judged_at_ms):
            hinted = ", and a gateway's link to it broke" if loss.hinted else ""
            await self._lose(loss.worker, f"worker lost: no progress for {loss.silent_ms:.0f} ms{hinted}")

    async def _lose(self, worker: WorkerId, why: str) -> None:
        """Requeue all that a worker has, and retire it. If it lives, it comes back under a new id."""
        self.view.forget_worker(worker)
        logger.warning("lost", extra={"worker": worker, "why": why})
        self._telemetry.metrics.workers_lost.inc()
        for start in await self._store.inbox(worker).outstanding():
            requeue = moves.Requeue(start.key, start.attempt, new_nonce(), why, self._fence)
            asked_at_ms = self._clock()
            answer = await self._store.requests.requeue(requeue)
            if answer.verdict == Verdict.NOT_LEADER:
                raise Deposed("a requeue was refused")
            if answer.verdict == Verdict.OK:
                self._telemetry.requeued(start, worker, self._clock() - asked_at_ms)
            logger.info(
                "requeued",
                extra={
                    **log.about(start.key, start.traceparent),
                    "worker": worker,
                    "attempt": answer.index,
                    "verdict": answer.verdict,
                },
            )
        if not await self._store.workers.retire(worker, self._fence):
            raise Deposed(f"worker {worker} could not be retired")

    def _idle_ms(self) -> int:
        """How long nothing is to be done by itself, rounded up; at least 1: in Redis, 0 would be for ever."""
        due_ms = self._next_check_ms
        lost_ms = self.view.liveness.next_due_ms()
        if lost_ms is not None:
            due_ms = min(due_ms, lost_ms)
        return max(1, min(MAX_BLOCK_MS, int(due_ms - self._clock()) + 1))
