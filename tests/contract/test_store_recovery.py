"""After Redis restarted nothing moves until the leader has recovered the pool; then what was accepted goes on."""

import pytest
from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import Holdings, WorkerReport
from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.record import Attempt
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.connection import Recovering, StoreUnavailable, command, connect
from services.common.store.inbox import Inbox
from services.common.store.intake import Intake
from services.common.store.leadership import Leadership, Lease
from services.common.store.recovery import Recovery
from services.common.store.streams import FIRST
from tests.conftest import RedisServer
from tests.contract.builders import (
    FIRST_ATTEMPT,
    KEY,
    TTL_MS,
    WORKER,
    a_leader,
    a_payload,
    a_place,
    a_placed_request,
    a_store,
    a_submit,
    a_worker,
)  # fmt: skip

ENDED_KEY = RequestKey("acme/ended")
QUEUED_KEY = RequestKey("acme/queued")


async def test_on_the_very_first_start_nothing_is_accepted_before_the_leader_is_there(redis: Redis, pool: str) -> None:
    store, recovery = a_store(redis, pool), Recovery(redis, pool)
    with pytest.raises(Recovering):
        await store.submit(a_submit())
    assert await recovery.generation() is None
    await a_leader(redis, pool)
    assert await recovery.needed() is None
    assert (await store.submit(a_submit())).answer.verdict == Verdict.OK


async def test_every_move_waits_for_recovery(redis: Redis, pool: str) -> None:
    lease = await a_placed_request(redis, pool)
    await redis.set(f"{{{pool}}}:generation", "another-server")
    store = a_store(redis, pool)
    refused = [
        store.submit(a_submit(QUEUED_KEY)),
        store.submit(a_submit()),
        store.place(a_place(lease)),
        store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 0, (1,))]),
        store.finish(moves.Finish(KEY, FIRST_ATTEMPT, RequestState.FINISHED, ((0, ()),), b"")),
        store.requeue(moves.Requeue(KEY, FIRST_ATTEMPT, "n2", "lost", fence=lease.fence)),
        store.rebase(moves.Rebase(KEY, FIRST_ATTEMPT, "n2", ((),))),
        store.cancel(moves.Cancel(KEY, "enough")),
        store.attach(moves.Attach(KEY, "gateway:2", ())),
        store.sweep([moves.Sweep(KEY, lease.fence)]),
        store.read(KEY),
        store.peek([KEY]),
    ]
    for move in refused:
        with pytest.raises(Recovering):
            await move
    record = await anext(Recovery(redis, pool).unfinished())
    assert (record.state, record.reader, record.cancel) == (RequestState.PLACED, 1, False)


async def test_that_a_reader_left_is_noted_also_in_recovery(redis: Redis, pool: str) -> None:
    await a_placed_request(redis, pool)
    await redis.set(f"{{{pool}}}:generation", "another-server")
    store = a_store(redis, pool)
    assert (await store.leave(moves.Leave(KEY, 2))).verdict == Verdict.STALE
    assert (await store.leave(moves.Leave(KEY, 1))).verdict == Verdict.OK
    assert (await anext(Recovery(redis, pool).unfinished())).reader_left_at_ms


async def test_a_restarted_redis_is_recovered_and_its_requests_go_on(own_redis_server: RedisServer) -> None:
    pool = "restarted"
    redis = await connect(own_redis_server.url)
    store = a_store(redis, pool)
    lease = await one_runs_one_waits_one_has_ended(redis, pool)
    recovered_before = await Recovery(redis, pool).generation()
    await command(redis, "WAITAOF", 1, 0, 5000)

    own_redis_server.kill()
    with pytest.raises(StoreUnavailable):
        await store.now_ms()
    own_redis_server.start()

    recovery = Recovery(redis, pool)
    run_id = await recovery.needed()
    assert run_id is not None
    assert run_id != recovered_before
    assert await recovery.generation() == recovered_before
    with pytest.raises(Recovering):
        await store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 2, (9,))])
    directory = await a_worker(redis, pool)
    assert await directory.report(WorkerReport(worker_id=WORKER), TTL_MS)
    await Leadership(redis, pool, "leader-1").resign()
    lease = await a_leader_in_recovery(redis, pool, lease.epoch)

    holdings = Holdings(holder=WORKER)
    holdings.requests.add(key=KEY, attempt=6, nonce="n6")
    await recovery.post(Holdings(holder=WORKER), run_id)
    await recovery.post(holdings, run_id)
    assert await recovery.posted(run_id) == [holdings]
    assert {record.key async for record in recovery.unfinished()} == {KEY, QUEUED_KEY}
    for key in (KEY, QUEUED_KEY):
        answer = await store.recover(moves.Recover(key, lease.fence, "n7", floor=7))
        assert (answer.verdict, answer.index) == (Verdict.OK, 7)
    restore = a_restore(RequestKey("acme/lost"), lease.fence)
    assert (await store.restore(restore)).verdict == Verdict.OK
    assert (await store.restore(restore)).verdict == Verdict.KNOWN
    assert not await recovery.complete(run_id, "1:somebody")
    assert not await recovery.complete("another-server", lease.fence)
    assert await recovery.complete(run_id, lease.fence)

    assert await recovery.needed() is None
    queued = await Intake(redis, pool).read(FIRST, 0, 10)
    assert [(one.key, one.attempt) for one in queued] == [
        (KEY, Attempt(7, "n7")), (QUEUED_KEY, Attempt(7, "n7")), (restore.key, Attempt(3, "n3")),
    ]  # fmt: skip
    stale = await store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 2, (9,))])
    assert stale[0].verdict == Verdict.STALE
    assert (await store.place(a_place(lease, KEY, Attempt(7, "n7")))).verdict == Verdict.OK
    assert [one.attempt.number for one in await Inbox(redis, pool, WORKER).outstanding()] == [7]
    await redis.aclose()


async def one_runs_one_waits_one_has_ended(redis: Redis, pool: str) -> Lease:
    lease = await a_placed_request(redis, pool)
    store = a_store(redis, pool)
    await store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 0, (7, 8))])
    await store.submit(a_submit(QUEUED_KEY))
    await store.submit(a_submit(ENDED_KEY))
    await store.cancel(moves.Cancel(ENDED_KEY, "enough"))
    return lease


async def a_leader_in_recovery(redis: Redis, pool: str, known_epoch: int) -> Lease:
    lease = await Leadership(redis, pool, "leader-2").acquire(TTL_MS, known_epoch)
    assert lease is not None
    assert lease.epoch > known_epoch
    return lease


def a_restore(key: RequestKey, fence: str) -> moves.Restore:
    return moves.Restore(
        key=key,
        fence=fence,
        digest="digest",
        payload=a_payload(),
        num_choices=1,
        nonce="n3",
        gateway="gateway:1",
        reader=2,
        resume_ms=1000,
        accepted_at_ms=1,
        deadline_at_ms=0,
        journal=((5, 6),),
        floor=3,
    )


async def test_only_a_restart_or_another_server_calls_for_recovery(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    assert await Recovery(redis, pool).needed() is None
    other = await connect(f"redis://127.0.0.1:{redis.connection_pool.connection_kwargs['port']}")
    assert await Recovery(other, pool).needed() is None
    await other.aclose()
