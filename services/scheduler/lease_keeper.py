"""The lease of a reign, renewed until it is lost."""

import asyncio
from dataclasses import dataclass
from typing import NoReturn

from services.common.store.leadership import Leadership, Lease
from services.scheduler.clock import Clock
from services.scheduler.deposed import Deposed


@dataclass(frozen=True, slots=True)
class Term:
    """How leadership is kept, in ms."""

    ttl_ms: int = 2_000
    """It lasts so long from the call that gave it."""
    renew_ms: int = 500
    """At most half of that."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease, and when it was asked for by one's own clock: it is surely valid for the term's ttl from then."""

    lease: Lease
    asked_at_ms: float


async def keep(leadership: Leadership, held: Held, term: Term, clock: Clock) -> NoReturn:
    """Renew until that fails. Raises Deposed when the lease is another's or may be, and StoreError.

    It judges by its own clock: after a pause longer than the ttl, somebody else may lead, whatever Redis would say.
    """
    asked_at_ms = held.asked_at_ms
    while True:
        await asyncio.sleep(term.renew_ms / 1000)
        expires_at_ms, asked_at_ms = asked_at_ms + term.ttl_ms, clock()
        if asked_at_ms >= expires_at_ms:
            raise Deposed(f"the lease was not renewed for {asked_at_ms - expires_at_ms + term.ttl_ms:.0f} ms")
        try:
            async with asyncio.timeout((expires_at_ms - asked_at_ms) / 1000):
                lease = await leadership.acquire(term.ttl_ms, held.lease.epoch)
        except TimeoutError as error:
            raise Deposed("the lease expired while its renewal was waited for") from error
        if lease is None or lease.fence != held.lease.fence:
            raise Deposed("the lease is another's")
