"""Readers wake as soon as there is something to read, wait no longer than they may, and can be cancelled."""

import asyncio
from time import monotonic

import pytest
from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import WorkerReport
from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.states import RequestState
from services.common.store.connection import MAX_BLOCK_MS, StoreUnavailable, connect
from services.common.store.events import Events, Released
from services.common.store.inbox import CancelAttempt, Inbox, Redirect, Start
from services.common.store.intake import Intake
from services.common.store.leader_feed import read_leader
from services.common.store.streams import FIRST
from tests.conftest import RedisServer
from tests.contract.builders import (
    FIRST_ATTEMPT,
    KEY,
    TTL_MS,
    WORKER,
    a_leader,
    a_place,
    a_placed_request,
    a_store,
    a_submit,
    a_worker,
)  # fmt: skip

SOON_S = 0.5
"""Far below the time that the readers here would wait."""


async def test_a_waiting_leader_wakes_for_a_new_request_and_for_a_report(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    directory = await a_worker(redis, pool)
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        waiting = group.create_task(read_leader(redis, pool, FIRST, FIRST, MAX_BLOCK_MS, 10))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await a_store(redis, pool).submit(a_submit())
    batch = waiting.result()
    assert [queued.key for queued in batch.intake] == [KEY]
    assert batch.events == []
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        after = batch.intake[-1].entry_id
        waiting = group.create_task(read_leader(redis, pool, after, FIRST, MAX_BLOCK_MS, 10))
        await asyncio.sleep(0.05)
        await directory.report(WorkerReport(worker_id=WORKER, steps=3), TTL_MS)
    assert waiting.result().intake == []
    assert [event for _, event in waiting.result().events] == [WorkerReport(worker_id=WORKER, steps=3)]


async def test_a_waiting_worker_wakes_for_a_placement(redis: Redis, pool: str) -> None:
    lease = await a_leader(redis, pool)
    await a_worker(redis, pool)
    store = a_store(redis, pool)
    await store.submit(a_submit(deadline_ms=30_000))
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        waiting = group.create_task(Inbox(redis, pool, WORKER).read(FIRST, MAX_BLOCK_MS, 10))
        await asyncio.sleep(0.05)
        await store.place(a_place(lease))
    [(_, start)] = waiting.result()
    assert isinstance(start, Start)
    assert (start.key, start.attempt, start.journal) == (KEY, FIRST_ATTEMPT, ((),))
    assert 25_000 < start.remaining_ms <= 30_000


async def test_a_deadline_that_passed_in_the_inbox_leaves_one_millisecond(redis: Redis, pool: str) -> None:
    """0 would say that there is none."""
    lease = await a_leader(redis, pool)
    await a_worker(redis, pool)
    store = a_store(redis, pool)
    await store.submit(a_submit(deadline_ms=50))
    await store.place(a_place(lease))
    await asyncio.sleep(0.06)
    [(_, start)] = await Inbox(redis, pool, WORKER).read(FIRST, 0, 10)
    assert isinstance(start, Start)
    assert start.remaining_ms == 1


async def test_a_read_returns_nothing_after_its_time(redis: Redis, pool: str) -> None:
    started = monotonic()
    assert await Intake(redis, pool).read(FIRST, 100, 10) == []
    assert 0.09 < monotonic() - started < SOON_S
    started = monotonic()
    assert await Intake(redis, pool).read(FIRST, 0, 10) == []
    assert monotonic() - started < 0.09


async def test_no_read_waits_longer_than_the_socket_would(redis: Redis, pool: str) -> None:
    started = monotonic()
    assert await Events(redis, pool).read(FIRST, 60_000, 10) == []
    assert monotonic() - started < MAX_BLOCK_MS / 1000 + SOON_S


async def test_a_reader_goes_on_behind_what_it_has_seen(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    store, intake = a_store(redis, pool), Intake(redis, pool)
    keys = [RequestKey(f"acme/r{number}") for number in range(5)]
    for key in keys:
        await store.submit(a_submit(key))
    first = await intake.read(FIRST, 0, 2)
    rest = await intake.read(first[-1].entry_id, 0, 100)
    assert [queued.key for queued in first + rest] == keys
    assert await redis.xlen(intake.stream) == 5  # reading takes nothing out


async def test_a_worker_reads_each_notice_once_and_only_starts_remain(redis: Redis, pool: str) -> None:
    await a_placed_request(redis, pool)
    store, inbox = a_store(redis, pool), Inbox(redis, pool, WORKER)
    await store.attach(moves.Attach(KEY, "gateway:2", ()))
    await store.cancel(moves.Cancel(KEY, "enough"))
    messages = await inbox.read(FIRST, 0, 10)
    assert [type(message) for _, message in messages] == [Start, Redirect, CancelAttempt]
    assert [type(message) for _, message in await inbox.read(FIRST, 0, 10)] == [Start]
    await store.finish(moves.Finish(KEY, FIRST_ATTEMPT, RequestState.CANCELLED, ((0, ()),), b""))
    assert await inbox.read(FIRST, 0, 10) == []
    assert [event for _, event in await Events(redis, pool).read(FIRST, 0, 10)] == [Released(KEY, WORKER)]


async def test_a_cancelled_read_leaves_the_client_usable(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    intake = Intake(redis, pool)
    for _ in range(5):
        reading = asyncio.create_task(intake.read(FIRST, MAX_BLOCK_MS, 10))
        await asyncio.sleep(0.02)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await a_store(redis, pool).submit(a_submit())
    assert [queued.key for queued in await intake.read(FIRST, MAX_BLOCK_MS, 10)] == [KEY]
    assert await a_store(redis, pool).now_ms() > 0


async def test_a_reader_is_told_when_redis_dies(own_redis_server: RedisServer) -> None:
    redis = await connect(own_redis_server.url)
    reading = asyncio.create_task(Intake(redis, "dying").read(FIRST, MAX_BLOCK_MS, 10))
    await asyncio.sleep(0.05)
    own_redis_server.kill()
    with pytest.raises(StoreUnavailable):
        await reading
    await redis.aclose()
