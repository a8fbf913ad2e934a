"""A pool has one leader: its lease expires, its epoch only grows, and moves of an earlier leader are refused."""

import asyncio

from redis.asyncio import Redis

from services.common.record import moves
from services.common.record.record import Attempt
from services.common.record.transitions import Verdict
from services.common.store.keys import Keys
from services.common.store.leadership import Leadership
from tests.contract.builders import (
    FIRST_ATTEMPT,
    KEY,
    TTL_MS,
    a_leader,
    a_place,
    a_store,
    a_submit,
    a_worker,
    recovered,
)

SHORT_MS = 60


async def test_only_one_of_two_candidates_leads(redis: Redis, pool: str) -> None:
    first, second = Leadership(redis, pool, "first"), Leadership(redis, pool, "second")
    leases = await asyncio.gather(first.acquire(TTL_MS), second.acquire(TTL_MS))
    assert sum(lease is not None for lease in leases) == 1
    assert await first.holder() == ("first" if leases[0] else "second")


async def test_a_renewal_keeps_the_epoch_and_prolongs_the_lease(redis: Redis, pool: str) -> None:
    first, second = Leadership(redis, pool, "first"), Leadership(redis, pool, "second")
    lease = await first.acquire(TTL_MS)
    for number in (2, 3):
        assert await first.acquire(number * TTL_MS) == lease
        assert await redis.pttl(Keys(pool).leader) > (number - 1) * TTL_MS
        assert await second.acquire(TTL_MS) is None


async def test_an_expired_lease_goes_to_the_next_under_a_higher_epoch(redis: Redis, pool: str) -> None:
    first, second = Leadership(redis, pool, "first"), Leadership(redis, pool, "second")
    lost = await first.acquire(SHORT_MS)
    await asyncio.sleep(2 * SHORT_MS / 1000)
    assert await first.holder() is None
    won = await second.acquire(TTL_MS)
    assert lost is not None
    assert won is not None
    assert won.epoch == lost.epoch + 1
    assert won.fence == f"{won.epoch}:second"
    assert await first.acquire(TTL_MS) is None


async def test_a_leader_that_resigns_is_followed_at_once_but_resigns_only_for_itself(redis: Redis, pool: str) -> None:
    first, second = Leadership(redis, pool, "first"), Leadership(redis, pool, "second")
    await first.acquire(TTL_MS)
    await second.resign()
    assert await first.holder() == "first"
    await first.resign()
    assert await second.acquire(TTL_MS) is not None


async def test_an_election_goes_above_the_epoch_that_the_candidate_knows(redis: Redis, pool: str) -> None:
    """Redis may have lost the writes of later elections."""
    leadership = Leadership(redis, pool, "first")
    lease = await leadership.acquire(TTL_MS, known_epoch=41)
    assert lease is not None
    assert lease.epoch == 42
    forgotten = await leadership.acquire(TTL_MS, known_epoch=50)
    assert forgotten is not None
    assert forgotten.epoch == 51


async def test_moves_of_an_earlier_leader_are_refused(redis: Redis, pool: str) -> None:
    earlier = await a_leader(redis, pool, "earlier")
    directory = await a_worker(redis, pool)
    store = a_store(redis, pool)
    await store.submit(a_submit())
    await Leadership(redis, pool, "earlier").resign()
    later = await a_leader(redis, pool, "later")

    assert (await store.place(a_place(earlier))).verdict == Verdict.NOT_LEADER
    assert (await store.sweep([moves.Sweep(KEY, earlier.fence)]))[0].verdict == Verdict.NOT_LEADER
    assert not await directory.retire((await directory.all())[0][0], earlier.fence)
    assert (await store.place(a_place(later))).verdict == Verdict.OK
    requeue = moves.Requeue(KEY, FIRST_ATTEMPT, "n2", "lost", fence=earlier.fence)
    assert (await store.requeue(requeue)).verdict == Verdict.NOT_LEADER
    peek = (await store.peek([KEY]))[0]
    assert peek is not None
    assert peek.attempt == Attempt(1, "n1")


async def test_a_pool_that_is_recovered_stays_so_under_the_next_leader(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool, "earlier")
    await Leadership(redis, pool, "earlier").resign()
    lease = await Leadership(redis, pool, "later").acquire(TTL_MS)
    assert lease is not None
    await recovered(redis, pool, lease)
    assert (await a_store(redis, pool).submit(a_submit())).answer.verdict == Verdict.OK
