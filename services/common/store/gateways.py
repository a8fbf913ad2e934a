"""Which gateways live: one expiring key each, outside pools."""

from collections.abc import Sequence

from redis.asyncio import Redis

from services.common.store.connection import command, translated
from services.common.store.keys import gateway_key


class GatewayLease:
    """Leases of gateways. All methods raise StoreUnavailable and may be repeated; `beat` raises StoreFull too."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def beat(self, address: str, ttl_ms: int) -> None:
        """The gateway at this fleet address lives for `ttl_ms` more."""
        await command(self._redis, "SET", gateway_key(address), "1", "PX", ttl_ms)

    async def alive(self, addresses: Sequence[str]) -> list[bool]:
        """Which of these live, in one round trip."""
        if not addresses:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for address in addresses:
            pipeline.execute_command("EXISTS", gateway_key(address))
        with translated():
            return [bool(exists) for exists in await pipeline.execute()]
