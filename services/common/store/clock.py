"""The time that all records share: Redis' clock."""

from redis.asyncio import Redis

from services.common.store.connection import command


async def now_ms(redis: Redis) -> int:
    """Redis' clock, ms since the epoch. Raises StoreUnavailable."""
    seconds, microseconds = await command(redis, "TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000
