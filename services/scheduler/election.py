"""A candidate: it leads whenever it can, and stands by otherwise. What it does as a leader is in `leader`."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from services.common.alone import alone
from services.common.ids import Epoch
from services.common.store.connection import StoreError, StoreUnfit
from services.common.store.leadership import Leadership
from services.scheduler.clock import Clock
from services.scheduler.deposed import Deposed
from services.scheduler.lease_keeper import Held, Term

logger = logging.getLogger(__name__)

FIRST_BACKOFF_MS = 50
LONGEST_BACKOFF_MS = 500
RESIGN_MS = 300
"""Longest that the lease is tried to be given back at the end."""

Reign = Callable[[Held, bool], Coroutine[Any, Any, None]]
"""Lead with a lease, until Deposed or StoreError is raised. The flag: this process has met a leader, or led, before."""


class Candidate:
    """One process' side of the election of a leader."""

    def __init__(self, leadership: Leadership, term: Term, reign: Reign, clock: Clock) -> None:
        self._leadership = leadership
        self._term = term
        self._reign = reign
        self._clock = clock
        self._known_epoch = Epoch(0)
        self._seen_life = False
        self._backoff_ms = FIRST_BACKOFF_MS

    async def run(self) -> NoReturn:
        """Stand for election until cancelled; the lease is then given back. Raises StoreUnfit, and defects.

        When Redis is away it waits, longer each time up to a bound, and then begins again: a reign rebuilds everything.
        """
        try:
            while True:
                try:
                    await self._stand()
                except StoreUnfit:
                    raise
                except StoreError as error:
                    await self._back_off(str(error))
        finally:
            await self._resign()

    async def _stand(self) -> None:
        asked_at_ms = self._clock()
        lease = await self._leadership.acquire(self._term.ttl_ms, self._known_epoch)
        self._backoff_ms = FIRST_BACKOFF_MS
        seen_life, self._seen_life = self._seen_life, True
        if lease is None:
            await asyncio.sleep(self._term.renew_ms / 1000)
            return
        self._known_epoch = lease.epoch
        logger.info("leads", extra={"epoch": lease.epoch})
        try:
            await alone(self._reign(Held(lease, asked_at_ms), seen_life))
        except Deposed as deposed:
            await self._back_off(str(deposed))

    async def _back_off(self, error: str) -> None:
        logger.warning("does not lead", extra={"error": error, "retry_ms": self._backoff_ms})
        await asyncio.sleep(self._backoff_ms / 1000)
        self._backoff_ms = min(2 * self._backoff_ms, LONGEST_BACKOFF_MS)

    async def _resign(self) -> None:
        try:
            async with asyncio.timeout(RESIGN_MS / 1000):
                await self._leadership.resign()
        except (StoreError, TimeoutError) as error:
            logger.warning("the lease was not given back; it expires", extra={"error": str(error)})
