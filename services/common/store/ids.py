"""Which pool owns a request id: idempotency over the whole fleet (docs/protocol.md, "Identity")."""

from redis.asyncio import Redis

from services.common.store.connection import command
from services.common.store.keys import id_key

ID_LIFETIME_S = 7 * 24 * 3600
"""How long an id stays taken after its claim."""


async def claim_id(redis: Redis, tenant: str, request_id: str, pool: str) -> str:
    """Take an id for a pool, unless it is taken; return the pool that owns it. Retries answer the same.

    Raises StoreFull, StoreUnavailable.
    """
    owner = await command(redis, "SET", id_key(tenant, request_id), pool, "NX", "GET", "EX", ID_LIFETIME_S)
    return owner.decode() if owner else pool


async def pool_of(redis: Redis, tenant: str, request_id: str) -> str | None:
    """The pool that owns an id, or None. Raises StoreUnavailable."""
    owner = await command(redis, "GET", id_key(tenant, request_id))
    return owner.decode() if owner else None
