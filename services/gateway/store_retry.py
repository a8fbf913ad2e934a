"""Calls to Redis on behalf of a client: repeated while it is away, within a bound, and then an error that says so."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.common.errors import Exhausted, ShoalError, Unavailable
from services.common.store.connection import Recovering, StoreFull, StoreUnavailable

WITHIN_S = 2.0
RETRY_S = 0.1
RETRY_AFTER_MS = 1_000

R = TypeVar("R")


async def retried(call: Callable[[], Awaitable[R]], within_s: float = WITHIN_S) -> R:
    """Return what a repeatable call answers. Raises Unavailable (whether it was done is unknown), Exhausted."""
    cause: Exception = TimeoutError(f"no answer within {within_s} s")
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    return await call()
                except (StoreUnavailable, Recovering) as error:
                    cause = error
                except StoreFull as error:
                    raise Exhausted(
                        f"the fleet's store is full: {error}", reason="STORE_FULL", retry_after_ms=RETRY_AFTER_MS
                    ) from error
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise unavailable(cause) from cause


def unavailable(cause: Exception) -> ShoalError:
    """What a client is told while Redis is away."""
    reason = "STORE_RECOVERING" if isinstance(cause, Recovering) else "STORE_UNAVAILABLE"
    return Unavailable(f"the fleet's store is away: {cause}", reason=reason, retry_after_ms=RETRY_AFTER_MS)
