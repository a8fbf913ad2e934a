"""The pool's leader: a lease that expires, and an epoch that grows with each election."""

from dataclasses import dataclass

from redis.asyncio import Redis

from services.common.ids import Epoch
from services.common.store.connection import command
from services.common.store.keys import Keys
from services.common.store.scripts import Script


@dataclass(frozen=True, slots=True)
class Lease:
    """Leadership held until `ttl_ms` after the call that gave it was made."""

    epoch: Epoch
    fence: str
    """`<epoch>:<holder>`: what every move of the leader carries."""


class Leadership:
    """One candidate for a pool's leadership. `holder` is new at each start of its process, and holds no `:`."""

    def __init__(self, redis: Redis, pool: str, holder: str) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._holder = holder
        self._acquire = Script.load("acquire")
        self._resign = Script.load("resign")

    async def acquire(self, ttl_ms: int, known_epoch: int = 0) -> Lease | None:
        """Take a free lease, or renew one's own. None: another holds it.

        A new election's epoch is above the stored and the known one; a renewal keeps it, unless Redis has forgotten
        an epoch that is known (then it counts as an election). Works in recovery. Repeated: a renewal. Raises
        StoreError.
        """
        epoch = await self._acquire.call(
            self._redis, self._named, (self._keys.prefix, "", 0, self._holder, ttl_ms, known_epoch)
        )
        return Lease(Epoch(epoch), f"{epoch}:{self._holder}") if epoch else None

    async def resign(self) -> None:
        """Give the lease up, if it is one's own. May be repeated. Raises StoreError."""
        await self._resign.call(self._redis, self._named, (self._keys.prefix, "", 0, self._holder))

    async def holder(self) -> str | None:
        """Who leads now. Raises StoreUnavailable."""
        fence = await command(self._redis, "GET", self._keys.leader)
        return fence.decode().split(":", 1)[1] if fence else None

    @property
    def _named(self) -> tuple[str, ...]:
        return (self._keys.generation, self._keys.leader, self._keys.epoch)
