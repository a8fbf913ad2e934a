"""The leader, on a real Redis with fake workers: what is accepted is placed, once there is room, on a living worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Sized
from dataclasses import replace
from functools import partial
from statistics import median

import pytest
from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import LinkBroken
from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.states import RequestState
from services.common.record.transitions import Answer
from services.common.store.connection import StoreUnavailable
from services.common.store.keys import Keys
from services.common.store.requests import RequestStore
from services.scheduler.view import View
from tests.contract.scheduler_pool import QUICK, SchedulerPool, SkewedClock, scheduler_pool, until

FAR = 3_600_000
"""Never, in ms: for what a test must show to happen without it."""


@pytest.fixture
async def fleet(redis: Redis, pool: str) -> AsyncIterator[SchedulerPool]:
    async with scheduler_pool(redis, pool) as parts:
        yield parts


async def test_an_accepted_request_is_placed_within_milliseconds(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    worker = await fleet.a_worker()
    await fleet.recovered()
    took_ms = []
    for number in range(20):
        submitted_at = time.perf_counter()
        await fleet.submit(f"r{number}")
        start = await worker.next_start()
        if number:  # the first one also waits for the worker to be noticed
            took_ms.append((time.perf_counter() - submitted_at) * 1000)
        await worker.finish(start)
    assert median(took_ms) < 25


async def test_without_room_a_request_stays_in_the_queue_until_something_is_released(fleet: SchedulerPool) -> None:
    # Registrations and readers are not looked at again: what is shown comes from events alone.
    await fleet.a_scheduler(replace(QUICK, registration_check_ms=FAR, scan_ms=FAR))
    await fleet.recovered()
    worker = await fleet.a_worker(num_blocks=2)
    first, second, third = [await fleet.submit(name) for name in ("first", "second", "third")]
    start = await worker.next_start()
    assert (await worker.next_start()).key == second
    await fleet.reaches(second, RequestState.PLACED)
    assert (await fleet.record(third)).state == RequestState.QUEUED
    assert start.key == first
    await worker.finish(start)
    assert (await worker.next_start(within_s=1)).key == third


async def test_a_silent_workers_requests_go_on_elsewhere(fleet: SchedulerPool) -> None:
    scheduler = await fleet.a_scheduler()
    silent = await fleet.a_worker()
    await fleet.recovered()
    key = await fleet.submit("r")
    first = await silent.next_start()
    silent.alive.clear()
    other = await fleet.a_worker()
    second = await other.next_start()
    assert second.key == key
    assert second.attempt.number == 2
    decisions = (await fleet.record(key)).decisions
    assert any(decision.detail.startswith("worker lost: no progress for") for decision in decisions)
    assert silent.id not in dict(await fleet.store.workers.all())
    # What it still says is refused, and what the other says counts.
    assert (await silent.finish(first)).verdict == "stale"
    assert (await other.finish(second)).verdict == "ok"
    await until(lambda: _has(scheduler.reigns[-1].view.live(), 0))


async def test_a_silent_worker_whose_link_to_a_gateway_broke_is_found_by_its_missing_report(
    fleet: SchedulerPool,
) -> None:
    await fleet.a_scheduler(replace(QUICK, lost_after_ms=FAR))
    silent = await fleet.a_worker()
    await fleet.recovered()
    first = await fleet.given(silent, "r")
    silent.alive.clear()
    assert await fleet.store.workers.link_broken(LinkBroken(worker_id=silent.id))
    other = await fleet.a_worker()
    assert (await other.next_start()).attempt.number == 2
    decisions = (await fleet.record(first.key)).decisions
    assert any(decision.detail.endswith("a gateway's link to it broke") for decision in decisions)


async def test_a_worker_that_reports_but_makes_no_step_is_lost(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    stuck = await fleet.a_worker()
    stuck.makes_steps = False
    await fleet.recovered()
    await fleet.submit("r")
    await stuck.next_start()
    other = await fleet.a_worker()
    assert (await other.next_start()).attempt.number == 2


async def test_an_idle_worker_may_be_silent(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    worker = await fleet.a_worker()
    await fleet.recovered()
    await worker.finish(await fleet.given(worker, "before"))
    worker.alive.clear()
    # Longer than a busy worker may be silent.
    await asyncio.sleep(1.5 * QUICK.lost_after_ms / 1000)
    worker.alive.set()
    assert (await fleet.given(worker, "after")).attempt.number == 1


async def test_a_stalled_leader_does_not_declare_workers_lost(fleet: SchedulerPool) -> None:
    clock = SkewedClock()
    patient = replace(QUICK, lease_ttl_ms=60_000, lost_after_ms=1_000, registration_check_ms=FAR)
    scheduler = await fleet.a_scheduler(patient, clock)
    await fleet.recovered()
    worker = await fleet.a_worker()
    first = await fleet.given(worker, "first")
    worker.alive.clear()
    clock.jump(20_000)
    await fleet.submit("second")
    # It is placed by the leader's first look at the world after its stall, behind its judgement of workers.
    await until(lambda: _has(scheduler.reigns[-1].view.ledger.accounts[worker.id].reservations, 2))
    worker.alive.set()
    assert (await worker.next_start()).key == "acme/second"
    assert (await worker.finish(first)).verdict == "ok"
    assert len(scheduler.reigns) == 1


async def test_a_leader_that_was_stopped_for_longer_than_its_lease_begins_again(fleet: SchedulerPool) -> None:
    clock = SkewedClock()
    scheduler = await fleet.a_scheduler(QUICK, clock)
    await fleet.recovered()
    worker = await fleet.a_worker()
    first = await fleet.given(worker, "first")
    clock.jump(20_000)
    await until(lambda: _has(scheduler.reigns, 2))
    assert (await fleet.given(worker, "second")).attempt.number == 1
    assert (await worker.finish(first)).verdict == "ok"


async def test_a_follower_takes_over_and_rebuilds_what_is_reserved(fleet: SchedulerPool) -> None:
    leader = await fleet.a_scheduler(immortal=True)
    await fleet.recovered()
    first, second = await fleet.a_worker(num_blocks=4), await fleet.a_worker(num_blocks=3)
    for number in range(9):
        await fleet.submit(f"r{number}")
    ended = await first.next_start()
    await first.finish(ended)
    await until(lambda: _holds_all_but(leader.reigns[-1].view, ended.key, num_held=7, num_waiting=1))
    follower = await fleet.a_scheduler()
    expected = set(leader.reigns[-1].view.ledger.holdings())
    waiting = [queued.key for queued in leader.reigns[-1].view.queue.in_order()]
    await leader.die()
    await until(follower.leads)
    await until(lambda: _holds_all_but(follower.reigns[-1].view, ended.key, num_held=7, num_waiting=1))
    view = follower.reigns[-1].view
    assert set(view.ledger.holdings()) == expected
    assert [queued.key for queued in view.queue.in_order()] == waiting
    # And it leads: room that comes is used.
    await second.finish(await second.next_start())
    await until(lambda: _has(view.queue, 0))


async def test_a_leader_that_resigns_is_followed_at_once(fleet: SchedulerPool) -> None:
    slow_to_expire = replace(QUICK, lease_ttl_ms=60_000)
    leader = await fleet.a_scheduler(slow_to_expire)
    worker = await fleet.a_worker()
    await until(leader.leads)
    follower = await fleet.a_scheduler(slow_to_expire)
    await leader.die()
    await until(follower.leads)
    assert (await fleet.given(worker, "r")).attempt.number == 1


async def test_a_leader_whose_lease_was_taken_places_nothing_more(fleet: SchedulerPool) -> None:
    leader = await fleet.a_scheduler()
    worker = await fleet.a_worker()
    await until(leader.leads)
    await fleet.recovered()
    await fleet.store.redis.set(f"{{{fleet.store.pool}}}:leader", "99:usurper", px=1_000)
    key = await fleet.submit("r")
    await fleet.reaches(key, RequestState.QUEUED)
    # The usurper dies; the deposed leader comes back, with an epoch above it or not, and only then places.
    start = await worker.next_start()
    assert start.key == key
    assert len(leader.reigns) >= 2


@pytest.mark.parametrize("scan_ms", [QUICK.scan_ms, FAR])
async def test_what_an_earlier_try_of_the_leader_placed_late_is_watched_like_the_rest(
    fleet: SchedulerPool, monkeypatch: pytest.MonkeyPatch, scan_ms: int
) -> None:
    place, tries = RequestStore.place, list[moves.Place]()

    async def first_runs_late(self: RequestStore, move: moves.Place) -> Answer:
        tries.append(move)
        if len(tries) == 1:
            raise StoreUnavailable("the connection died")  # Redis runs it when the next reign has read everything
        if len(tries) == 2:
            assert (await place(self, tries[0])).verdict == "ok"
        return await place(self, move)

    monkeypatch.setattr(RequestStore, "place", first_runs_late)
    await fleet.a_scheduler(replace(QUICK, scan_ms=scan_ms))
    await fleet.recovered()
    silent = await fleet.a_worker()
    await fleet.submit("r")
    start = await silent.next_start()
    assert start.attempt.number == 1
    silent.alive.clear()
    other = await fleet.a_worker()
    assert (await other.next_start()).attempt.number == 2


async def test_a_request_that_expires_in_the_queue_is_never_placed(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    await fleet.recovered()
    key = await fleet.submit("r", deadline_ms=60)
    record = await fleet.reaches(key, RequestState.EXPIRED)
    assert record.placed_at_ms == 0
    worker = await fleet.a_worker()
    assert (await fleet.given(worker, "next")).key == "acme/next"


async def test_a_cancelled_request_is_never_placed(fleet: SchedulerPool) -> None:
    scheduler = await fleet.a_scheduler()
    await fleet.recovered()
    key = await fleet.submit("r")
    await fleet.store.requests.cancel(moves.Cancel(key, "test"))
    # Nobody asks for its place, so only the scan can notice.
    await until(lambda: _has(scheduler.reigns[-1].view.queue, 0))
    worker = await fleet.a_worker()
    assert (await fleet.given(worker, "next")).key == "acme/next"


async def test_a_request_that_nobody_reads_is_cancelled_after_its_resume_time(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    await fleet.recovered()
    key = await fleet.submit("r", resume_ms=100)
    await fleet.store.requests.leave(moves.Leave(key, reader=1))
    record = await fleet.reaches(key, RequestState.CANCELLED)
    assert record.ended_at_ms >= record.reader_left_at_ms + 100


async def test_the_readers_of_a_dead_gateway_have_left(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    worker = await fleet.a_worker()
    await fleet.recovered()
    running = await fleet.given(worker, "running")
    await fleet.store.redis.delete("gateway:gateway:1")
    await until(lambda: _left(fleet, running.key))


async def test_a_request_that_a_worker_hands_back_goes_on(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    worker = await fleet.a_worker(num_blocks=1)
    await fleet.recovered()
    first = await fleet.given(worker, "r")
    await worker.hand_back(first)
    again = await worker.next_start()
    assert (again.key, again.attempt.number) == (first.key, 2)


async def test_newcomers_do_not_hasten_the_loss_of_a_worker_whose_registration_expired(
    fleet: SchedulerPool, redis: Redis
) -> None:
    scheduler = await fleet.a_scheduler(replace(QUICK, registration_check_ms=FAR))
    await fleet.recovered()
    late = await fleet.a_worker()
    await until(partial(_has, scheduler.reigns[-1].view.ledger.accounts, 1))
    late.alive.clear()
    await redis.pexpire(Keys(fleet.store.pool).worker(late.id), 0)
    for number in range(2, 5):
        await fleet.a_worker()
        await until(partial(_has, scheduler.reigns[-1].view.ledger.accounts, number))
    assert late.id in dict(await fleet.store.workers.all())


async def test_a_worker_that_closes_its_registration_is_given_nothing_more(fleet: SchedulerPool) -> None:
    await fleet.a_scheduler()
    closing = await fleet.a_worker(num_blocks=1000)
    await fleet.recovered()
    start = await fleet.given(closing, "r")
    await fleet.store.workers.close(closing.id)
    other = await fleet.a_worker()
    assert (await fleet.given(other, "next")).key == "acme/next"
    # It hands back what it has; whether it does or the leader takes it, the request goes on.
    await closing.hand_back(start)
    assert (await other.next_start()).key == start.key


async def _has(things: Sized, number: int) -> bool:
    return len(things) == number


async def _holds_all_but(view: View, ended: RequestKey, *, num_held: int, num_waiting: int) -> bool:
    held = [reservation.key for _, reservation in view.ledger.holdings()]
    return len(held) == num_held and ended not in held and len(view.queue) == num_waiting


async def _left(fleet: SchedulerPool, key: RequestKey) -> bool:
    return (await fleet.record(key)).reader_left_at_ms > 0
