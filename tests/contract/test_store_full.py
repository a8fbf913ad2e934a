"""When Redis is at its memory limit, new requests are refused whole, and accepted ones run to their end."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.connection import StoreFull, StoreUnfit, command, connect
from services.common.store.ids import claim_id
from services.common.store.recovery import Recovery
from tests.conftest import RedisServer
from tests.contract.builders import FIRST_ATTEMPT, KEY, a_leader, a_place, a_store, a_submit, a_worker


@pytest.fixture
async def own_redis(own_redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = await connect(own_redis_server.url)
    yield client
    await client.aclose()


async def test_a_full_redis_refuses_new_requests_and_lets_accepted_ones_end(own_redis: Redis) -> None:
    redis, pool = own_redis, "full"
    lease = await a_leader(redis, pool)
    await a_worker(redis, pool)
    store = a_store(redis, pool)
    await store.submit(a_submit())
    before = await keys_of(redis)
    await redis.config_set("maxmemory", 1)

    with pytest.raises(StoreFull):
        await store.submit(a_submit(RequestKey("acme/next")))
    with pytest.raises(StoreFull):
        await claim_id(redis, "acme", "next", pool)
    assert await keys_of(redis) == before
    assert (await store.place(a_place(lease))).verdict == Verdict.OK
    assert (await store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 0, (1, 2))]))[0].verdict == Verdict.OK
    requeue = moves.Requeue(KEY, FIRST_ATTEMPT, "n2", "lost", fence=lease.fence)
    assert (await store.requeue(requeue)).verdict == Verdict.OK
    assert (await store.cancel(moves.Cancel(KEY, "enough"))).verdict == Verdict.ENDED
    read = await store.read(KEY)
    assert read is not None
    assert read[0].state == RequestState.CANCELLED
    assert await Recovery(redis, pool).needed() is None


async def keys_of(redis: Redis) -> set[bytes]:
    return set(await command(redis, "KEYS", "*"))


async def test_a_redis_that_may_evict_requests_is_refused(own_redis_server: RedisServer, own_redis: Redis) -> None:
    await own_redis.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreUnfit, match="noeviction"):
        await connect(own_redis_server.url)
