"""When a worker's front writes journals: what is due at once, and what waits for an interval."""

from redis.asyncio import Redis

from services.common.record.states import RequestState
from services.common.store.keys import Keys
from tests.contract.worker_front import Bench, served

NEVER_MS = 600_000


async def test_a_request_that_begins_is_told_at_once_and_hurries_no_other_ones_journal(redis: Redis, pool: str) -> None:
    async with served(Bench(redis, pool), journal_interval_ms=NEVER_MS) as bench:
        first = await bench.submit("a", max_tokens=9)
        seen = bench.gateway.expect(first)
        await bench.place(first)
        await bench.record_until(first, lambda record: record.state == RequestState.RUNNING)
        bench.engine.step()
        await bench.gateway.until(lambda: len(seen.tokens) == 1)
        second = await bench.submit("b")
        bench.gateway.expect(second)
        await bench.place(second)
        await bench.record_until(second, lambda record: record.state == RequestState.RUNNING)
        assert (await bench.record(first)).journal == ((),)


async def test_every_16_tokens_of_a_request_are_journaled_without_waiting(redis: Redis, pool: str) -> None:
    async with served(Bench(redis, pool), journal_interval_ms=NEVER_MS) as bench:
        key, _ = await bench.run("a", max_tokens=40)
        bench.engine.steps(17)
        record = await bench.record_until(key, lambda record: bool(record.journal[0]))
        assert len(record.journal[0]) >= 16


async def test_all_that_is_missing_is_journaled_each_interval(redis: Redis, pool: str) -> None:
    async with served(Bench(redis, pool), journal_interval_ms=5) as bench:
        keys = [await bench.submit(name, max_tokens=9) for name in "ab"]
        for key in keys:
            bench.gateway.expect(key)
            await bench.place(key)
        await bench.engine.until(lambda: len(bench.engine.sequences) == 2)
        bench.engine.step()
        for key in keys:
            await bench.record_until(key, lambda record: record.journal == ((10,),))


async def test_an_end_brings_all_that_redis_lost_of_the_journal(redis: Redis, pool: str) -> None:
    async with served(Bench(redis, pool)) as bench:
        key, seen = await bench.run("a", max_tokens=3)
        bench.engine.steps(2)
        await bench.record_until(key, lambda _: bench.session.active[key].run.tails() == ((2, ()),))
        await redis.delete(Keys(pool).journal(key, 0))
        bench.engine.step()
        await bench.gateway.until(lambda: seen.end is not None)
        assert (await bench.record(key)).journal == ((10, 11, 12),)
