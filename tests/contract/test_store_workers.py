"""Workers register, report and leave; one that falls silent is found out and loses nothing that it had."""

import asyncio

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import WorkerInfo, WorkerReport
from services.common.ids import GatewayId, WorkerId
from services.common.record import moves
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.events import Events
from services.common.store.gateways import GatewayLease
from services.common.store.inbox import Drain, Inbox
from services.common.store.keys import Keys
from services.common.store.streams import FIRST
from services.common.store.workers import WorkerDirectory
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


async def test_a_registered_worker_is_found_with_what_it_can(redis: Redis, pool: str) -> None:
    directory = await a_worker(redis, pool)
    await directory.register(WorkerInfo(worker_id=WORKER, num_blocks=7, draining=True), TTL_MS)
    assert await directory.all() == [(WORKER, WorkerInfo(worker_id=WORKER, num_blocks=7, draining=True))]
    assert await WorkerDirectory(redis, f"{pool}-other").all() == []


async def test_reports_keep_a_worker_registered_and_reach_the_events(redis: Redis, pool: str) -> None:
    directory = await a_worker(redis, pool, ttl_ms=TTL_MS)
    reports = [WorkerReport(worker_id=WORKER, sequence_number=number) for number in range(4)]
    for number, report in enumerate(reports, start=2):
        assert await directory.report(report, number * TTL_MS)
        assert await redis.pttl(Keys(pool).worker(WORKER)) > (number - 1) * TTL_MS
    events = Events(redis, pool)
    assert [event for _, event in await events.read(FIRST, 0, 10)] == reports
    assert [event for _, event in await events.newest(2)] == reports[2:]


async def test_a_silent_worker_is_not_registered_but_still_a_member(redis: Redis, pool: str) -> None:
    lease = await a_leader(redis, pool)
    directory = await a_worker(redis, pool, ttl_ms=1)
    await asyncio.sleep(0.02)
    assert await directory.all() == [(WORKER, None)]
    assert await directory.is_member(WORKER)
    assert not await directory.report(WorkerReport(worker_id=WORKER), TTL_MS)
    assert not await directory.drain(WORKER)
    store = a_store(redis, pool)
    await store.submit(a_submit())
    assert (await store.place(a_place(lease))).verdict == Verdict.NO_WORKER


async def test_a_worker_that_is_about_to_leave_gets_nothing_new(redis: Redis, pool: str) -> None:
    lease = await a_leader(redis, pool)
    directory = await a_worker(redis, pool)
    await directory.close(WORKER)
    store = a_store(redis, pool)
    await store.submit(a_submit())
    assert (await store.place(a_place(lease))).verdict == Verdict.NO_WORKER
    assert await directory.unregister(WORKER)
    assert await directory.all() == []


async def test_a_lost_worker_is_retired_only_when_its_requests_are_taken_back(redis: Redis, pool: str) -> None:
    lease = await a_placed_request(redis, pool)
    directory, inbox = WorkerDirectory(redis, pool), Inbox(redis, pool, WORKER)
    assert not await directory.retire(WORKER, lease.fence)
    assert not await directory.unregister(WORKER)
    [held] = await inbox.outstanding()
    assert (held.key, held.attempt, held.prompt_tokens, held.max_tokens, held.num_choices) == (
        KEY, FIRST_ATTEMPT, 5, 16, 1,
    )  # fmt: skip
    store = a_store(redis, pool)
    await store.requeue(moves.Requeue(held.key, held.attempt, "n2", "lost", fence=lease.fence))
    assert await inbox.outstanding() == []
    assert await directory.retire(WORKER, lease.fence)
    assert await directory.retire(WORKER, lease.fence)
    assert await directory.all() == []
    assert await inbox.read(FIRST, 0, 10) == []


async def test_a_notice_to_a_retired_worker_makes_no_inbox(redis: Redis, pool: str) -> None:
    """Were its inbox made again, nobody would ever delete it."""
    await a_placed_request(redis, pool)
    await redis.delete(f"{{{pool}}}:inbox:{WORKER}")
    store = a_store(redis, pool)
    assert (await store.cancel(moves.Cancel(KEY, "enough"))).verdict == Verdict.OK
    assert (await store.attach(moves.Attach(KEY, "gateway:2", ()))).answer.verdict == Verdict.OK
    assert not await redis.exists(f"{{{pool}}}:inbox:{WORKER}")
    finish = moves.Finish(KEY, FIRST_ATTEMPT, RequestState.CANCELLED, ((0, ()),), b"")
    assert (await store.finish(finish)).verdict == Verdict.OK


async def test_a_worker_is_told_to_drain(redis: Redis, pool: str) -> None:
    directory = await a_worker(redis, pool)
    assert await directory.drain(WORKER)
    assert not await directory.drain(WorkerId("nobody"))
    assert [message for _, message in await Inbox(redis, pool, WORKER).read(FIRST, 0, 10)] == [Drain()]


async def test_a_gateway_lives_while_it_beats(redis: Redis) -> None:
    lease = GatewayLease(redis)
    await lease.beat(GatewayId("10.0.0.1:1#a"), TTL_MS)
    await lease.beat(GatewayId("10.0.0.2:1#a"), 1)
    await asyncio.sleep(0.02)
    assert await lease.alive(["10.0.0.1:1#a", "10.0.0.2:1#a", "10.0.0.1:1#b"]) == [True, False, False]
    assert await lease.alive([]) == []
