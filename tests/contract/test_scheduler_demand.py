"""A scheduler tells how many workers its pool needs; with none at all, requests wait for the first one to come."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from redis.asyncio import Redis

from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from services.common.record.states import RequestState
from tests.contract.scheduler_pool import QUICK, Scheduler, SchedulerPool, scheduler_pool, until

CONFIG = replace(QUICK, min_workers=0, max_workers=5, quiet_ms=1_000, demand_look_ms=30)


async def told(parts: SchedulerPool, condition: Callable[[PoolDemand], bool]) -> PoolDemand:
    """The leader's word once the condition holds of it."""
    seen = PoolDemand()

    async def holds() -> bool:
        nonlocal seen
        word = await parts.store.demand.read()
        seen = word.demand if word else PoolDemand()
        return word is not None and condition(seen)

    await until(holds)
    return seen


async def test_a_request_without_any_worker_is_held_until_one_comes_and_runs_there(redis: Redis, pool: str) -> None:
    async with scheduler_pool(redis, pool) as parts:
        await parts.a_scheduler(CONFIG)
        await parts.recovered()
        assert (await told(parts, lambda _: True)).workers_wanted == 0
        key = await parts.submit("r1")
        word = await told(parts, lambda word: word.workers_wanted == 1)
        assert (word.waiting_requests, word.workers_ready) == (1, 0)
        assert (await parts.record(key)).state is RequestState.QUEUED
        worker = await parts.a_worker(num_blocks=77)
        await worker.finish(await worker.next_start())
        word = await told(parts, lambda word: word.workers_wanted == 0)
        assert word.smallest_worker.num_blocks == 77
        assert word.startup_ms > 0, "it saw how long the worker took to come"


async def test_the_next_leader_goes_on_from_the_last_ones_word(redis: Redis, pool: str) -> None:
    patient = replace(CONFIG, quiet_ms=60_000)
    async with scheduler_pool(redis, pool) as parts:
        first = await parts.a_scheduler(patient)
        await parts.recovered()
        await parts.a_worker(num_blocks=10, max_sequences=1)
        for name in ("r1", "r2", "r3"):
            await parts.submit(name, prompt_tokens=100, max_tokens=20)
        await told(parts, lambda word: word.workers_ready == 1 and word.waiting_requests == 2)
        wanted = (await told(parts, lambda word: word.workers_wanted > 0)).workers_wanted
        await first.die()
        second = await parts.a_scheduler(patient)
        await until(second.leads)
        assert (await told(parts, lambda word: word.waiting_requests == 2)).workers_wanted == wanted


async def test_prometheus_reads_what_the_leader_wants_and_a_follower_wants_nothing(redis: Redis, pool: str) -> None:
    async with scheduler_pool(redis, pool) as parts:
        leader = await parts.a_scheduler(CONFIG)
        await parts.recovered()
        follower = await parts.a_scheduler(CONFIG)
        await parts.submit("r1")
        await told(parts, lambda word: word.workers_wanted == 1)
        await until(_is(leader, "shoal_workers_wanted", 1))
        assert follower.figure("shoal_workers_wanted") == 0
        await leader.die()
        assert leader.figure("shoal_workers_wanted") == 0, "who leads no more says nothing of the pool"


def _is(scheduler: Scheduler, name: str, value: float) -> Callable[[], Awaitable[bool]]:
    async def shows() -> bool:
        return scheduler.figure(name) == value

    return shows
