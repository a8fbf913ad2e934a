"""Which gateways live: one expiring key each, outside pools."""

from collections.abc import Sequence

from redis.asyncio import Redis

from services.common.ids import GatewayId
from services.common.store.connection import command, translated
from services.common.store.keys import gateway_key


class GatewayLease:
    """Leases of gateways. All methods raise StoreUnavailable and may be repeated; `beat` raises StoreFull too."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def beat(self, gateway: GatewayId, ttl_ms: int) -> None:
        """This gateway lives for `ttl_ms` more."""
        await command(self._redis, "SET", gateway_key(gateway), "1", "PX", ttl_ms)

    async def alive(self, gateways: Sequence[str]) -> list[bool]:
        """Which of these live, in one round trip."""
        if not gateways:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for gateway in gateways:
            pipeline.execute_command("EXISTS", gateway_key(gateway))
        with translated():
            return [bool(exists) for exists in await pipeline.execute()]
