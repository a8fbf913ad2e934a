"""The script that grants does what services/common/grants.py says, whatever was stated and has expired before."""

import asyncio
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from services.common.grants import LIFE_MS, Ask, Stated, granted
from services.common.ids import GatewayId
from services.common.store.connection import command
from services.common.store.grants import GrantStore
from services.common.store.keys import Keys

GATEWAYS = [GatewayId(f"127.0.0.1:{number}#abc") for number in range(4)]

asks = st.builds(
    Ask,
    gateway=st.sampled_from(GATEWAYS),
    num_on_their_way=st.integers(0, 12),
    num_wanted=st.integers(0, 20),
    backlog_limit=st.integers(1, 30),
)
steps = st.tuples(asks, st.integers(0, 10), st.sampled_from([0, 0, 1, LIFE_MS // 2, LIFE_MS - 1, LIFE_MS, 3 * LIFE_MS]))
"""An ask, the backlog's length at that time, and the ms since the last."""

_pools = count(1)


@settings(max_examples=150, deadline=None)
@given(history=st.lists(steps, max_size=25))
def test_redis_and_the_pure_code_grant_the_same(
    runner: asyncio.Runner, store_client: Redis, history: list[tuple[Ask, int, int]]
) -> None:
    async def live() -> None:
        now_ms = 1_700_000_000_000
        pool = f"grants-{next(_pools)}"
        keys, store = Keys(pool), GrantStore(store_client, pool, lambda: now_ms)
        stated: dict[GatewayId, Stated] = {}
        for ask, length, pause_ms in history:
            now_ms += pause_ms
            await _make_length(store_client, keys.intake, length)
            expected, stated = granted(ask, stated, length, now_ms)
            assert await store.ask(ask) == expected
            assert await _stated(store_client, keys.grants) == stated
        await command(store_client, "DEL", keys.intake, keys.grants)

    runner.run(live())


async def _make_length(client: Redis, stream: str, length: int) -> None:
    await command(client, "DEL", stream)
    for _ in range(length):
        await command(client, "XADD", stream, "*", "key", "t/r")


async def _stated(client: Redis, name: str) -> dict[GatewayId, Stated]:
    fields = await command(client, "HGETALL", name)
    return {
        GatewayId(gateway.decode()): Stated(*(int(number) for number in value.split()))
        for gateway, value in fields.items()
    }


async def test_nothing_is_left_of_a_pool_in_which_nobody_asks_any_more(redis: Redis, pool: str) -> None:
    store = GrantStore(redis, pool)
    await store.ask(Ask(GATEWAYS[0], 3, 2, 10))
    assert 0 < await redis.pttl(Keys(pool).grants) <= 60 * LIFE_MS
    await store.ask(Ask(GATEWAYS[0], 0, 0, 10))
    assert not await redis.exists(Keys(pool).grants)
