"""Redis was killed and started again: nothing that was accepted is lost, and nothing runs twice to the reader."""

import time
from collections.abc import AsyncIterator

import pytest

from gen.shoal.fleet.v1.request_pb2 import HeldRequest, Holdings
from gen.shoal.inference.v1.inference_pb2 import TokenIds
from services.common.record.states import RequestState
from services.common.store.connection import connect
from services.scheduler.config import SchedulerConfig
from tests.conftest import RedisServer
from tests.contract.scheduler_pool import GATEWAY, SchedulerPool, a_payload, scheduler_pool, until


@pytest.fixture
async def fleet(own_redis_server: RedisServer, pool: str) -> AsyncIterator[SchedulerPool]:
    redis = await connect(own_redis_server.url)
    async with scheduler_pool(redis, pool) as parts:
        yield parts
    await redis.aclose()


async def test_after_a_restart_of_redis_requests_go_on(fleet: SchedulerPool, own_redis_server: RedisServer) -> None:
    await fleet.a_scheduler()
    await fleet.a_scheduler()
    await fleet.recovered()
    worker = await fleet.a_worker(num_blocks=1)
    running = await fleet.given(worker, "running")
    waiting = await fleet.submit("waiting")
    own_redis_server.kill()
    own_redis_server.start()
    await fleet.beat()
    await fleet.recovered()
    # Its worker said that it runs it: it is left alone, and its end is taken.
    assert (await worker.finish(running)).verdict == "ok"
    again = await worker.next_start()
    assert again.key == waiting
    assert again.attempt.number == 2
    assert (await worker.finish(again)).verdict == "ok"


async def test_what_its_worker_no_longer_has_is_requeued(fleet: SchedulerPool, own_redis_server: RedisServer) -> None:
    await fleet.a_scheduler()
    await fleet.recovered()
    worker = await fleet.a_worker(num_blocks=1)
    forgotten = await fleet.given(worker, "r")
    own_redis_server.kill()
    worker.holds.clear()
    own_redis_server.start()
    again = await worker.next_start()
    assert (again.key, again.attempt.number) == (forgotten.key, 2)


async def test_what_redis_lost_is_put_back_by_its_gateway(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    await fleet.recovered()
    worker = await fleet.a_worker()
    lost = await fleet.given(worker, "r")
    await fleet.store.redis.flushall()
    await until(lambda: _needs_recovery(fleet))
    run_id = await fleet.store.recovery.needed()
    assert run_id is not None
    await fleet.store.recovery.post(Holdings(holder=GATEWAY, requests=[_read_here("r", (7, 8, 9))]), run_id)
    again = await worker.next_start()
    assert again.key == lost.key
    assert again.attempt.number == 2  # above what both stated
    assert again.journal == ((7, 8, 9),)
    assert again.reader == 4
    assert (await worker.finish(lost)).verdict == "stale"


async def test_what_a_gateway_states_after_the_recovery_is_put_back_once(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    await fleet.recovered()
    worker = await fleet.a_worker()
    kept = await fleet.given(worker, "kept")
    run_id = await fleet.store.recovery.generation()
    assert run_id is not None
    stated = [_read_here("kept", ()), _read_here("late", (7, 8, 9))]
    await fleet.store.recovery.post(Holdings(holder=GATEWAY, requests=stated), run_id)
    late = await worker.next_start()
    assert (late.key, late.attempt.number, late.journal, late.reader) == ("acme/late", 2, ((7, 8, 9),), 4)
    assert (await worker.finish(kept)).verdict == "ok", "what Redis knows is left alone"
    assert (await worker.finish(late)).verdict == "ok"
    await until(lambda: _is_forgotten(fleet, run_id))


async def test_a_reader_that_no_gateway_states_has_left(fleet: SchedulerPool, own_redis_server: RedisServer) -> None:
    await fleet.a_scheduler()
    await fleet.recovered()
    worker = await fleet.a_worker()
    # Redis may have lost that the first was read on elsewhere, and that the last reader had gone.
    unread, read, moved = [await fleet.given(worker, name) for name in ("unread", "read", "moved")]
    own_redis_server.kill()
    own_redis_server.start()
    await until(lambda: _needs_recovery(fleet))
    run_id = await fleet.store.recovery.needed()
    assert run_id is not None
    stated = [_read_here("read", (), reader=1), _read_here("moved", (), reader=2)]
    await fleet.store.recovery.post(Holdings(holder=GATEWAY, requests=stated), run_id)
    await fleet.recovered()
    left = [bool((await fleet.record(start.key)).reader_left_at_ms) for start in (unread, read, moved)]
    # Who reads under another number attaches again by itself.
    assert left == [True, False, True]
    assert (await worker.finish(unread)).verdict == "ok", "what runs is left alone"


async def test_a_fresh_fleet_waits_for_nobody(fleet: SchedulerPool) -> None:
    started_at = time.perf_counter()
    await fleet.a_scheduler(SchedulerConfig())
    await fleet.recovered()
    assert time.perf_counter() - started_at < 0.4


async def test_the_next_leader_finishes_a_recovery_that_the_first_began(
    fleet: SchedulerPool, own_redis_server: RedisServer
) -> None:
    leader = await fleet.a_scheduler(immortal=True)
    await fleet.recovered()
    key = await fleet.submit("r")
    own_redis_server.kill()
    own_redis_server.start()
    await until(lambda: _needs_recovery(fleet))
    await leader.die()
    await fleet.a_scheduler()
    await fleet.recovered()
    assert (await fleet.reaches(key, RequestState.QUEUED)).attempt.number == 2


def _read_here(name: str, delivered: tuple[int, ...], reader: int = 4) -> HeldRequest:
    return HeldRequest(
        key=f"acme/{name}",
        attempt=1,
        nonce="n1",
        choices=[TokenIds(ids=delivered)],
        payload=a_payload(name),
        payload_digest="digest",
        reader=reader,
        gateway=GATEWAY,
        accepted_at_ms=1_000,
        resume_ms=60_000,
    )


async def _needs_recovery(fleet: SchedulerPool) -> bool:
    return await fleet.store.recovery.needed() is not None


async def _is_forgotten(fleet: SchedulerPool, run_id: str) -> bool:
    return not await fleet.store.recovery.posted(run_id)
