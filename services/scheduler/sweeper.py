"""The leader's clock for requests: deadlines in the queue, readers that went away, gateways that died.

A request's deadline on a worker is the worker's to keep. Everything here is decided again by Redis, in Redis' time.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from services.common import log
from services.common.record import moves
from services.common.record.transitions import Verdict
from services.common.store.requests import MAX_BATCH, Peek
from services.scheduler.clock import Clock
from services.scheduler.deposed import Deposed
from services.scheduler.pool_store import PoolStore
from services.scheduler.view import Live, View

logger = logging.getLogger(__name__)

STRIKES = 2
"""Scans in a row that find no lease of a gateway before its readers are said to have left."""
RETRY_MS = 1_000
"""A sweep that came too early by Redis' clock is repeated after this."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often, in ms."""

    sweep_ms: int = 250
    """Least time between two looks at what is due."""
    scan_ms: int = 2_000
    """Between two looks at readers and gateways."""


class Sweeper:
    """Part of one reign. Its two tasks change the leader's view only between awaits."""

    def __init__(self, store: PoolStore, fence: str, view: View, clock: Clock, rhythm: Rhythm) -> None:
        self._store = store
        self._fence = fence
        self._view = view
        self._clock = clock
        self._rhythm = rhythm
        self._redis_ahead_ms = 0.0
        self._strikes: dict[str, int] = {}

    async def run(self) -> None:
        """Sweep and scan until cancelled. Raises an ExceptionGroup of Deposed and StoreError."""
        await self.read_clock()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sweep_for_ever())
            tasks.create_task(self._scan_for_ever())

    async def read_clock(self) -> None:
        """Compare Redis' clock with one's own. What is then taken for Redis' time is never ahead of it."""
        redis_ms = await self._store.requests.now_ms()
        self._redis_ahead_ms = redis_ms - self._clock()

    async def sweep(self) -> None:
        """End what is due. Raises Deposed, StoreError."""
        queue = self._view.queue
        due = self._view.deadlines.take_due(self._redis_now_ms(), MAX_BATCH)
        if not due:
            return
        answers = await self._store.requests.sweep([moves.Sweep(key, self._fence) for key in due])
        for key, answer in zip(due, answers, strict=True):
            attempt, about = queue.attempt(key), log.about(key, self._view.traceparent(key))
            match answer.verdict:
                case Verdict.NOT_LEADER:
                    raise Deposed("a sweep was refused")
                case Verdict.ENDED | Verdict.UNKNOWN if attempt is not None:
                    queue.drop(key, attempt)
                    logger.info("ended in the queue", extra=about)
                case Verdict.OK:
                    logger.info("cancelled: nobody reads it", extra=about)
                case Verdict.IDLE if attempt is not None:
                    self._view.deadlines.add(key, self._redis_now_ms() + RETRY_MS)

    async def scan(self) -> None:
        """Look after every live request: is it still where the leader thinks, and does anybody read it?

        Raises StoreError.
        """
        await self.read_clock()
        peeks = await self._peek_live()
        self._view.deadlines.prune({live.key for live in peeks})
        dead = await self._dead_gateways(peeks.values())
        for live, peek in peeks.items():
            if peek.reader_left_at_ms:
                self._watch_resume_time(live, peek)
            elif peek.gateway in dead:
                await self._store.requests.leave(moves.Leave(live.key, peek.reader))
                logger.info(
                    "left: its gateway died", extra={**log.about(live.key, peek.traceparent), "gateway": peek.gateway}
                )

    async def _peek_live(self) -> dict[Live, Peek]:
        peeks: dict[Live, Peek] = {}
        for batch in _batches(self._view.live()):
            answers = await self._store.requests.peek([live.key for live in batch])
            for live, peek in zip(batch, answers, strict=True):
                if peek is not None and self._view.agrees(live, peek):
                    peeks[live] = peek
                else:
                    self._view.forget(live, self._clock())
        return peeks

    def _watch_resume_time(self, live: Live, peek: Peek) -> None:
        due_at_ms = peek.reader_left_at_ms + peek.resume_ms
        # What is due later is found again by a later scan.
        if due_at_ms <= self._redis_now_ms() + self._rhythm.scan_ms:
            self._view.deadlines.add(live.key, due_at_ms)

    async def _dead_gateways(self, peeks: Iterable[Peek]) -> Mapping[str, int]:
        gateways = sorted({peek.gateway for peek in peeks if not peek.reader_left_at_ms})
        alive = await self._store.gateways.alive(gateways)
        self._strikes = {
            gateway: self._strikes.get(gateway, 0) + 1
            for gateway, lives in zip(gateways, alive, strict=True)
            if not lives
        }
        return {gateway: strikes for gateway, strikes in self._strikes.items() if strikes >= STRIKES}

    async def _sweep_for_ever(self) -> NoReturn:
        while True:
            await self.sweep()
            await asyncio.sleep(self._rhythm.sweep_ms / 1000)

    async def _scan_for_ever(self) -> NoReturn:
        while True:
            await self.scan()
            await asyncio.sleep(self._rhythm.scan_ms / 1000)

    def _redis_now_ms(self) -> int:
        return int(self._clock() + self._redis_ahead_ms)


def _batches(live: Iterable[Live]) -> Iterable[list[Live]]:
    rest = iter(live)
    while batch := list(islice(rest, MAX_BATCH)):
        yield batch
