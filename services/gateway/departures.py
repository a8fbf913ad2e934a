"""Readers that went away, told to Redis: from then on their requests live for their resume time only.

One task writes them, so that no call waits for Redis on its way out, and none is forgotten while Redis is away.
"""

import asyncio
import logging
from collections.abc import Mapping

from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.transitions import Verdict
from services.common.store.connection import Recovering, StoreError
from services.common.store.requests import RequestStore

logger = logging.getLogger(__name__)

MAX_WAITING = 100_000
RETRY_S = 0.5


class Departures:
    """Leaves to be written: at most MAX_WAITING; beyond, the oldest is dropped, and its request runs to its end."""

    def __init__(self, store: RequestStore) -> None:
        self._store = store
        self._waiting: dict[tuple[RequestKey, int], Mapping[str, object] | None] = {}
        """By request and reader: None, or what a log line says of a request that is to be cancelled."""
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, key: RequestKey, reader: int, *, cancel: Mapping[str, object] | None = None) -> None:
        """A reader of a request went away, or was never there. If another reads meanwhile, nothing happens.

        `cancel`: nobody will come to read on, so the request ends at once; a log line says this of it.
        """
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.pop(next(iter(self._waiting)))
        self._waiting[(key, reader)] = cancel
        self._idle.clear()
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                departure = next(iter(self._waiting))
                try:
                    await self._write(*departure, cancel=self._waiting[departure])
                except StoreError as error:
                    logger.warning(
                        "departures wait for Redis", extra={"waiting": len(self._waiting), "error": str(error)}
                    )
                    await asyncio.sleep(RETRY_S)
                else:
                    self._waiting.pop(departure, None)
            self._idle.set()

    async def _write(self, key: RequestKey, reader: int, *, cancel: Mapping[str, object] | None) -> None:
        answer = await self._store.leave(moves.Leave(key, reader))
        if cancel is not None and answer.verdict is Verdict.OK:
            try:
                await self._store.cancel(moves.Cancel(key, "its client hung up"))
            except Recovering:
                # Leaves behind this one don't wait: the leader ends it when its time without a reader is over.
                logger.info("not cancelled, for Redis is in recovery", extra=cancel)

    async def flush(self, within_s: float) -> bool:
        """Wait until all are written. False: it took too long, and those that are left are lost."""
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
