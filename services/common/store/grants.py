"""Grants in Redis: `services.common.grants`, as one script."""

from collections.abc import Callable

from redis.asyncio import Redis

from services.common.grants import LIFE_MS, Ask, Grant
from services.common.store.keys import Keys
from services.common.store.scripts import Script


class GrantStore:
    """Grants of one pool. `clock_ms`: for tests; otherwise it is Redis' own clock."""

    def __init__(self, redis: Redis, pool: str, clock_ms: Callable[[], int] | None = None) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._clock_ms = clock_ms
        self._grant = Script.load("grant")

    async def ask(self, ask: Ask) -> Grant:
        """What a gateway states now counts, in place of what it stated before. Works in recovery.

        Whatever was submitted before on the same connection is in the backlog by then. Raises StoreUnavailable (whether
        it was stated is then unknown), StoreFull.
        """
        now = "" if self._clock_ms is None else self._clock_ms()
        num_granted, num_taken = await self._grant.call(
            self._redis,
            (self._keys.generation, self._keys.grants),
            (
                self._keys.prefix, now, 0,
                ask.gateway, ask.num_on_their_way, ask.num_wanted, ask.backlog_limit, LIFE_MS,
            ),
        )  # fmt: skip
        return Grant(num_granted, num_taken)
