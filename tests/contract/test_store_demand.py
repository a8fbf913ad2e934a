"""Demand is the leader's word: nobody else's is written, and its age is told by Redis' clock."""

import asyncio

from redis.asyncio import Redis

from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from services.common.store.demand import DemandStore
from services.common.store.leadership import Leadership
from tests.contract.builders import a_leader

THREE = PoolDemand(workers_wanted=3)


async def test_the_leaders_word_is_read_by_anybody(redis: Redis, pool: str) -> None:
    leader = await a_leader(redis, pool)
    demand = DemandStore(redis, pool)
    assert await demand.read() is None
    assert await demand.tell(THREE, leader.fence)
    told = await demand.read()
    assert told is not None
    assert told.demand == THREE
    assert 0 <= told.age_ms < 10_000


async def test_who_leads_no_more_cannot_say_that_nothing_is_wanted(redis: Redis, pool: str) -> None:
    old = await a_leader(redis, pool, "leader-1")
    await Leadership(redis, pool, "leader-1").resign()
    new = await a_leader(redis, pool, "leader-2")
    demand = DemandStore(redis, pool)
    assert await demand.tell(THREE, new.fence)
    assert not await demand.tell(PoolDemand(workers_wanted=0), old.fence)
    told = await demand.read()
    assert told is not None
    assert told.demand == THREE


async def test_while_nobody_leads_the_last_word_stays_and_grows_old(redis: Redis, pool: str) -> None:
    leader = await a_leader(redis, pool)
    demand = DemandStore(redis, pool)
    await demand.tell(THREE, leader.fence)
    await Leadership(redis, pool, "leader-1").resign()
    assert not await demand.tell(PoolDemand(), "")
    await asyncio.sleep(0.05)
    told = await demand.read()
    assert told is not None
    assert told.demand == THREE
    assert told.age_ms >= 50
