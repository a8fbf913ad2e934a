"""A worker's front keeps its side of the protocol (docs/protocol.md)."""

import asyncio
import gc
import weakref

import pytest
from redis.asyncio import Redis

from gen.shoal.inference.v1 import inference_pb2
from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.history import Held
from services.common.record.record import Attempt, Record
from services.common.record.states import RequestState
from services.common.record.transitions import Answer
from services.common.store.connection import StoreUnavailable
from services.worker.front.engine_client import EngineDiedError
from services.worker.front.gateway_links import FEW
from services.worker.front.session import LostError
from tests.contract.worker_front import Bench, FakeGateway, serve_gateway

A_FORM = inference_pb2.ResponseFormat(regex="a+")


async def test_tokens_and_text_reach_the_gateway_and_the_end_is_told_only_after_it_is_stored(bench: Bench) -> None:
    key = await bench.submit("a", max_tokens=3)
    seen = bench.gateway.expect(key)
    told: list[asyncio.Task[Record]] = []
    bench.gateway.on_end = lambda end: told.append(asyncio.ensure_future(bench.record(key)))
    await bench.place(key)
    await bench.engine.until(lambda: bool(bench.engine.sequences))
    bench.engine.steps(3)
    await bench.gateway.until(lambda: seen.end is not None)
    assert (seen.tokens, seen.text) == ([10, 11, 12], "klm")
    record = await told[0]
    assert record.state == RequestState.FINISHED
    assert record.journal == ((10, 11, 12),)


async def test_many_requests_on_one_link_begin_stream_and_end_like_one(bench: Bench) -> None:
    keys = [await bench.submit(str(number), max_tokens=2) for number in range(FEW + 4)]
    seen = [bench.gateway.expect(key) for key in keys]
    for key in keys:
        await bench.place(key)
    await bench.engine.until(lambda: len(bench.engine.sequences) == len(keys))
    bench.engine.steps(2)
    await bench.gateway.until(lambda: all(each.end is not None for each in seen))
    assert {each.text for each in seen} == {"kl"}


async def test_a_second_attempt_samples_nothing_until_the_gateway_said_what_it_delivered(bench: Bench) -> None:
    key = await bench.lose("a", max_tokens=5)
    seen = bench.gateway.expect(key, held=(Held(2, (70, 71)),))
    await bench.place(key)
    await bench.engine.until(lambda: "release" in bench.engine.commands)
    (sequence,) = bench.engine.sequences
    assert bench.engine.sequences[sequence].held
    assert bench.engine.generated[sequence] == [70, 71], "what the client holds is forced"
    bench.engine.steps(3)
    await bench.gateway.until(lambda: seen.end is not None)
    assert seen.tokens == [12, 13, 14], "only what the client does not hold is sent"
    assert (await bench.record(key)).journal == ((70, 71, 12, 13, 14),)


async def test_a_second_attempt_waits_for_a_gateway_that_is_not_there(bench: Bench) -> None:
    key = await bench.lose("a", gateway="127.0.0.1:1")
    await bench.place(key)
    await bench.record_until(key, lambda record: record.state == RequestState.RUNNING)
    await bench.engine.until(lambda: bool(bench.engine.held))
    assert "release" not in bench.engine.commands


async def test_after_the_grace_it_samples_without_a_reader(bench: Bench) -> None:
    await bench.stop()
    await bench.start_session(resume_grace_ms=1)
    key = await bench.lose("a", max_tokens=1, gateway="127.0.0.1:1")
    await bench.place(key)
    await bench.engine.until(lambda: "release" in bench.engine.commands)
    bench.engine.step()
    record = await bench.record_until(key, lambda record: record.ended)
    assert record.state == RequestState.FINISHED


async def test_a_reader_with_another_history_continues_from_its_own_under_a_new_attempt(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=9)
    bench.engine.steps(2)
    await bench.record_until(key, lambda record: record.journal == ((10, 11),))
    other = FakeGateway()
    server, address = await serve_gateway(other)
    other.expect(key, reader=2, held=(Held(2, (10, 55)),))
    await bench.store.attach(moves.Attach(key, address, (Held(2, (10, 55)),)))
    record = await bench.record_until(key, lambda record: record.state == RequestState.QUEUED)
    assert (record.attempt.number, record.journal) == (2, ((10, 55),))
    await server.stop(0)


async def test_tokens_follow_the_reader_to_another_gateway(bench: Bench) -> None:
    key, seen = await bench.run("a", max_tokens=3)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [10])
    other = FakeGateway()
    server, address = await serve_gateway(other)
    there = other.expect(key, reader=2, held=(Held(1, (10,)),))
    await bench.store.attach(moves.Attach(key, address, (Held(1, (10,)),)))
    await bench.gateway.until(lambda: seen.closed)
    bench.engine.steps(2)
    await other.until(lambda: there.end is not None)
    assert (there.tokens, there.text) == ([11, 12], "lm")
    assert seen.tokens == [10]
    await server.stop(0)


async def test_a_gateway_started_anew_at_the_same_address_is_sent_to_over_the_same_stream(bench: Bench) -> None:
    key, seen = await bench.run("a", max_tokens=3, gateway=f"{bench.gateway_address}#first")
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [10])
    there = bench.gateway.expect(key, reader=2, held=(Held(1, (10,)),))
    await bench.store.attach(moves.Attach(key, f"{bench.gateway_address}#second", (Held(1, (10,)),)))
    await bench.gateway.until(lambda: bool(there.opened))
    bench.engine.steps(2)
    await bench.gateway.until(lambda: there.end is not None)
    assert there.tokens == [11, 12]
    assert not there.closed, "the word for who was there before would end who is there now"
    assert bench.gateway.num_streams == 1


async def test_an_answer_to_an_earlier_open_speaks_of_another_reader_and_is_ignored(bench: Bench) -> None:
    key, seen = await bench.run("a", max_tokens=4)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [10])
    # Another reader at the same gateway; what was said of an earlier one, who held another text, comes first.
    bench.gateway.late_answer = (Held(1, (55,)),)
    there = bench.gateway.expect(key, reader=2, held=(Held(1, (10,)),))
    await bench.store.attach(moves.Attach(key, bench.gateway_address, (Held(1, (10,)),)))
    await bench.gateway.until(lambda: bool(there.opened))
    bench.engine.step()
    await bench.gateway.until(lambda: there.tokens == [11])
    bench.engine.steps(2)
    await bench.gateway.until(lambda: there.end is not None)
    assert there.tokens == [11, 12, 13]
    assert (await bench.record(key)).attempt.number == 1


async def test_a_stop_text_ends_the_answer_before_it(bench: Bench) -> None:
    _, seen = await bench.run("a", max_tokens=50, stop="mn")
    bench.engine.steps(6)
    await bench.gateway.until(lambda: seen.end is not None)
    assert seen.text == "kl"
    assert seen.tokens == [10, 11, 12, 13]
    assert not bench.engine.sequences, "its blocks are free"


async def test_the_leader_is_told_what_steps_take_and_how_long_answers_became(bench: Bench) -> None:
    for name in ("ended", "cancelled"):
        key = await bench.submit(name, max_tokens=3 if name == "ended" else 50)
        await bench.place(key)
    await bench.engine.until(lambda: len(bench.engine.sequences) == 2)
    bench.engine.steps(3)
    await bench.record_until(bench.key("ended"), lambda record: record.state == RequestState.FINISHED)
    await bench.cancel(bench.key("cancelled"))
    await bench.record_until(bench.key("cancelled"), lambda record: record.state == RequestState.CANCELLED)
    report = await bench.report_until(lambda report: report.requests == 0)
    assert (report.step_time.fixed_ms, report.step_time.ms_per_token) == (5, 1)
    assert (report.ended_choices, report.ended_choice_tokens) == (1, 3), "a cancelled one says nothing of lengths"


async def test_a_cancelled_request_leaves_the_engine_and_ends(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    await bench.store.cancel(moves.Cancel(key, "client"))
    record = await bench.record_until(key, lambda record: record.ended)
    assert record.state == RequestState.CANCELLED
    assert not bench.engine.sequences


async def test_only_what_was_in_the_step_of_a_dying_engine_is_suspect(bench: Bench) -> None:
    first = await bench.submit("a", max_tokens=50)
    second = await bench.submit("b", max_tokens=50)
    for key in (first, second):
        bench.gateway.expect(key)
    await bench.place(first)
    await bench.engine.until(lambda: len(bench.engine.sequences) == 1)
    bench.engine.begin_step()
    await bench.place(second)
    await bench.engine.until(lambda: len(bench.engine.sequences) == 2)
    bench.engine.die()
    with pytest.raises(ExceptionGroup) as died:
        await bench.ended
    assert died.group_contains(EngineDiedError)
    suspect, bystander = await bench.record(first), await bench.record(second)
    assert (suspect.state, suspect.attempt.number) == (RequestState.QUEUED, 2)
    assert (bystander.state, bystander.attempt.number) == (RequestState.QUEUED, 2)
    assert suspect.suspect_until > 0
    assert bystander.suspect_until == 0


async def test_an_engine_that_is_unfit_under_way_counts_as_dead_and_blames_no_request(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    bench.engine.begin_step()
    bench.engine.end_as_unfit("model.gguf: is gone")
    with pytest.raises(ExceptionGroup):
        await bench.ended
    record = await bench.record(key)
    assert (record.state, record.attempt.number, record.suspect_until) == (RequestState.QUEUED, 2, 0)
    assert bench.figure("shoal_requeues_total", reason="engine_died") == 1
    assert bench.figure("shoal_engine_deaths_total") == 1


async def test_an_engine_that_the_kernel_killed_for_want_of_memory_blames_its_step(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    bench.engine.begin_step()
    bench.engine.die(returncode=-9, out_of_memory=True)
    with pytest.raises(ExceptionGroup):
        await bench.ended
    assert (await bench.record(key)).suspect_until > 0


@pytest.mark.parametrize("returncode", [-9, -15, 0])
async def test_an_engine_ended_from_outside_blames_nobody(bench: Bench, returncode: int) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    bench.engine.begin_step()
    bench.engine.die(returncode)
    with pytest.raises(ExceptionGroup):
        await bench.ended
    assert (await bench.record(key)).suspect_until == 0


async def test_a_stopped_worker_hands_over_with_every_token_journaled(bench: Bench) -> None:
    key, seen = await bench.run("a", max_tokens=50)
    bench.engine.steps(7)
    await bench.gateway.until(lambda: len(seen.tokens) == 7)
    await bench.stop()
    record = await bench.record(key)
    assert record.state == RequestState.QUEUED
    assert record.journal == ((10, 11, 12, 13, 14, 15, 16),)


async def test_a_gateway_that_knows_a_later_attempt_makes_the_worker_go_above_it(bench: Bench) -> None:
    key = await bench.submit("a", max_tokens=50)
    seen = bench.gateway.expect(key)
    seen.reader.open(Attempt(7, "lost with Redis"), 1)
    await bench.place(key)
    record = await bench.record_until(key, lambda record: record.state == RequestState.QUEUED)
    assert record.attempt.number == 8
    assert seen.tokens == []


async def test_tokens_go_on_when_the_stream_to_their_gateway_broke(redis: Redis, pool: str) -> None:
    bench = Bench(redis, pool)
    first, bench.gateway_address = await serve_gateway(bench.gateway)
    await bench.lead()
    await bench.start_session()
    _, seen = await bench.run("a", max_tokens=50)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [10])
    await first.stop(0)
    second, _ = await serve_gateway(bench.gateway, bench.gateway_address)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [10, 11])
    await bench.stop()
    await second.stop(0)


async def test_a_request_whose_reader_is_gone_leaves_nothing_behind(bench: Bench) -> None:
    key = await bench.submit("a", max_tokens=1)
    await bench.place(key)
    await bench.engine.until(lambda: bool(bench.engine.sequences))
    left = weakref.ref(bench.session.active[key])
    bench.engine.step()
    await bench.record_until(key, lambda record: record.ended)
    async with asyncio.timeout(5):
        while left() is not None:
            await asyncio.sleep(0.01)
            gc.collect()


async def test_of_steps_in_flight_the_longest_says_how_long_progress_may_take(bench: Bench) -> None:
    await bench.run("a", max_tokens=50)
    bench.engine.begin_step(1, predicted_ms=900)
    bench.engine.begin_step(2, predicted_ms=5)
    await bench.engine.heard()
    assert bench.session.predicted_step_ms == 900


async def test_an_engine_that_compiles_a_form_makes_no_step_and_is_no_death(bench: Bench) -> None:
    await bench.run("form", max_tokens=50, response_format=A_FORM)
    report = await bench.report_until(lambda report: report.requests == 1)
    assert report.predicted_step_ms == 0, "the leader waits as for those that wait for their gateway"
    bench.engine.step()
    await bench.report_until(lambda report: report.predicted_step_ms > 0 and report.steps == 1)


async def test_work_beside_a_form_that_is_compiled_does_not_wait(bench: Bench) -> None:
    await bench.run("form", max_tokens=50, response_format=A_FORM)
    await bench.run("plain", max_tokens=50)
    report = await bench.report_until(lambda report: report.requests == 2)
    assert report.predicted_step_ms > 0


async def test_an_engine_that_ends_slowly_is_waited_for_and_then_blames_its_step(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    bench.engine.begin_step()
    await bench.report_until(lambda report: report.predicted_step_ms > 0)
    bench.engine.is_ending = True
    report = await bench.report_until(lambda report: report.predicted_step_ms == 0)
    assert report.requests == 1, "the leader waits as for those that wait for their gateway"
    bench.engine.die()
    with pytest.raises(ExceptionGroup):
        await bench.ended
    assert (await bench.record(key)).suspect_until > 0


async def test_a_stopped_worker_blames_nobody_for_the_step_in_flight(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    bench.engine.begin_step()
    async with asyncio.timeout(5):
        while not bench.session.predicted_step_ms:
            await asyncio.sleep(0.001)
    await bench.stop()
    record = await bench.record(key)
    assert (record.state, record.suspect_until) == (RequestState.QUEUED, 0)


async def test_a_cancellation_that_only_the_last_flush_brings_ends_the_request(bench: Bench) -> None:
    key = await bench.submit("a", max_tokens=50)
    bench.gateway.expect(key)
    await bench.place(key)
    await bench.record_until(key, lambda record: record.state == RequestState.RUNNING)
    # The worker stops before it reads the notice in its inbox.
    await bench.redis.hset(f"{{{bench.pool}}}:request:{key}", "cancel", "1")
    bench.session.active[key].announced = False
    await bench.stop()
    assert bench.ended.cancelled()
    assert (await bench.record(key)).state == RequestState.CANCELLED


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 6, 8, 12, 20, 40])
async def test_a_worker_that_is_stopped_while_its_engine_dies_hands_over_and_stops(bench: Bench, turns: int) -> None:
    keys = [await bench.submit(name, max_tokens=50) for name in "abc"]
    for key in keys:
        bench.gateway.expect(key)
        await bench.place(key)
    await bench.engine.until(lambda: len(bench.engine.sequences) == 3)
    bench.engine.die()
    for _ in range(turns):
        await asyncio.sleep(0)
    was_running = await bench.stop()
    assert [(await bench.record(key)).state for key in keys] == [RequestState.QUEUED] * 3
    assert bench.ended.cancelled() == was_running


async def test_the_next_step_is_heard_of_while_the_engine_reads_nothing(bench: Bench) -> None:
    await bench.run("a", max_tokens=50, stop="l")
    await bench.run("b", max_tokens=50)
    bench.engine.reads.clear()
    bench.engine.steps(2)  # "kl": the engine is to forget the first
    bench.engine.begin_step(3, predicted_ms=900)
    await bench.report_until(lambda report: report.predicted_step_ms == 900)
    bench.engine.reads.set()


async def test_a_stuck_engine_does_not_keep_a_worker_from_handing_over(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=50)
    bench.engine.reads.clear()
    bench.ended.cancel()
    _, waiting = await asyncio.wait({bench.ended}, timeout=3)
    bench.engine.reads.set()
    assert not waiting
    assert (await bench.record(key)).state == RequestState.QUEUED


async def test_an_end_is_told_when_redis_goes_away_right_behind_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, read = bench.store.finish, bench.store.read
    finishes, reads = iter((True,)), iter((True,))

    async def finish_without_reply(move: moves.Finish) -> Answer:
        answer = await finish(move)
        if next(finishes, False):
            raise StoreUnavailable("its reply was lost")
        return answer

    async def read_later(key: RequestKey) -> tuple[Record, int] | None:
        if next(reads, False):
            raise StoreUnavailable("away again")
        return await read(key)

    _, seen = await bench.run("a", max_tokens=1)
    monkeypatch.setattr(bench.store, "finish", finish_without_reply)
    monkeypatch.setattr(bench.store, "read", read_later)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.end is not None)
    assert not bench.ended.done()


async def test_what_a_worker_gives_up_is_given_back_also_when_redis_is_away_for_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeue, tries = bench.store.requeue, iter(range(7))

    async def requeue_later(move: moves.Requeue) -> Answer:
        if next(tries, None) is not None:
            raise StoreUnavailable("away")
        return await requeue(move)

    monkeypatch.setattr(bench.store, "requeue", requeue_later)
    key = await bench.submit("a", max_tokens=50)
    bench.gateway.expect(key).reader.open(Attempt(7, "lost with Redis"), 1)
    await bench.place(key)
    record = await bench.record_until(key, lambda record: record.state == RequestState.QUEUED)
    assert record.attempt.number == 8


async def test_a_worker_whose_registration_redis_lost_lives_on_until_recovery(bench: Bench) -> None:
    run_id = await bench.redis.getdel(f"{{{bench.pool}}}:generation")
    assert run_id
    await bench.redis.delete(f"{{{bench.pool}}}:worker:{bench.session.worker}", f"{{{bench.pool}}}:workers")
    await asyncio.sleep(0.3)
    assert not bench.ended.done(), "it registers again in the recovery"
    await bench.redis.set(f"{{{bench.pool}}}:generation", run_id)
    with pytest.raises(ExceptionGroup) as lost:
        await bench.ended
    assert lost.group_contains(LostError)


async def test_a_worker_whose_registration_expired_while_redis_was_away_goes_on(bench: Bench) -> None:
    key, seen = await bench.run("a", max_tokens=2)
    await bench.redis.pexpire(f"{{{bench.pool}}}:worker:{bench.session.worker}", 0)
    async with asyncio.timeout(5):
        while (await bench.directory.all())[0][1] is None:
            assert not bench.ended.done()
            await asyncio.sleep(0.01)
    bench.engine.steps(2)
    await bench.gateway.until(lambda: seen.end is not None)
    record = await bench.record(key)
    assert (record.state, record.attempt.number) == (RequestState.FINISHED, 1)


async def test_a_worker_that_the_leader_gave_up_ends_its_session(bench: Bench) -> None:
    assert await bench.directory.retire(bench.session.worker, bench.fence)
    with pytest.raises(ExceptionGroup) as lost:
        await bench.ended
    assert lost.group_contains(LostError)
