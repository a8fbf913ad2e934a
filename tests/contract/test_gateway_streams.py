"""A client sees each token once, in order, and always one consistent text (docs/protocol.md, invariants 1 to 3)."""

import asyncio

import pytest

from gen.shoal.fleet.v1 import delivery_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import Aborted, DeadlineExceeded, Internal, InvalidRequest, NotFound
from services.common.ids import RequestKey, WorkerId, fleet_address
from services.common.record import moves
from services.common.record.record import Attempt, Record
from services.common.record.states import RequestState
from services.common.store.connection import command
from services.common.store.requests import RequestStore
from tests.contract.gateway_fleet import Fleet, frame, tokens_of


async def test_accepted_comes_only_after_the_request_is_stored(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    answer = gateway.generate(request_id="a", prompt="hello", sampling=pb.Sampling(temperature=0))
    assert await answer.accepted() == "a"
    record = await fleet.record(fleet.key("a"))
    assert (record.state, record.reader) == (RequestState.QUEUED, 1)
    assert fleet_address(record.gateway) == gateway.fleet_address
    assert record.resume_ms == 300_000, "a client that chose its id may come back for long"


async def test_tokens_come_in_order_and_the_end_behind_them(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    await started.send(2, "c")
    await started.worker.end(started.key, started.attempt, RequestState.FINISHED, 3)
    finished = await started.answer.end()
    assert (started.answer.text, started.answer.tokens) == ("abc", tokens_of("abc"))
    assert (finished.reason, finished.usage.completion_tokens) == (pb.FINISH_REASON_STOP, 3)


async def test_a_frame_that_comes_twice_is_shown_once_and_a_gap_is_asked_for(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    await started.send(0, "ab")
    await started.send(3, "d")
    answer = await started.worker.answer()
    assert [choice.count for choice in answer.resumes[0].choices] == [2]
    await started.send(2, "cd")
    await started.answer.until_text("abcd")


async def test_an_end_with_tokens_missing_before_it_is_not_told(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    await started.worker.end(started.key, started.attempt, RequestState.FINISHED, 3)
    await fleet.finish(started.key, started.attempt, "abc")
    await started.answer.end()
    assert started.answer.text == "abc", "the rest came from the record"


async def test_an_older_attempt_is_fenced_out(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    await started.answer.until_text("ab")
    await fleet.requeue(started.key)
    later = await fleet.place(started.key)
    answer = await started.worker.open(started.key, later)
    assert answer.resumes[0].choices[0].token_ids == tokens_of("ab"), "the new attempt is told what was delivered"
    await started.send(2, "X")
    await started.worker.end(started.key, started.attempt, RequestState.FINISHED, 2)
    await started.worker.send(started.key, later, 2, "c")
    await started.answer.until_text("abc")
    refused = await started.worker.open(started.key, started.attempt)
    assert refused.refusals[0].reason == delivery_pb2.REFUSAL_REASON_STALE_ATTEMPT
    assert refused.refusals[0].highest_attempt == later.number
    same_number = await started.worker.open(started.key, Attempt(later.number, "another nonce"))
    assert same_number.refusals[0].reason == delivery_pb2.REFUSAL_REASON_STALE_ATTEMPT


async def test_an_attach_at_another_gateway_goes_on_at_the_next_token_and_ends_the_first_stream(fleet: Fleet) -> None:
    first, second = await fleet.gateway(), await fleet.gateway()
    started = await fleet.started(first)
    await started.send(0, "ab")
    await started.answer.until_text("ab")
    attached = second.attach(started.answer.request_id, 2, "ab")
    await attached.accepted()
    record = await fleet.record(started.key)
    assert (record.reader, fleet_address(record.gateway)) == (2, second.fleet_address)
    await started.worker.close(started.key, 1)
    error = await started.answer.error()
    assert isinstance(error, Aborted)
    assert error.reason == "SUPERSEDED"
    elsewhere = await fleet.link(second)
    answer = await elsewhere.open(started.key, started.attempt, reader=2)
    assert answer.resumes[0].choices[0].token_ids == tokens_of("ab")
    await elsewhere.send(started.key, started.attempt, 2, "cd")
    await attached.until_text("cd")
    assert attached.from_index == 2


async def test_a_superseded_stream_ends_even_if_no_worker_says_so(fleet: Fleet) -> None:
    first, second = await fleet.gateway(), await fleet.gateway()
    started = await fleet.started(first)
    await second.attach(started.answer.request_id).accepted()
    assert (await started.answer.error()).reason == "SUPERSEDED"


async def test_of_two_attaches_at_one_gateway_the_later_one_wins(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    both = [gateway.attach(started.answer.request_id) for _ in range(2)]
    await asyncio.gather(*(answer.accepted() for answer in both))
    assert (await started.answer.error()).reason == "SUPERSEDED"
    assert (await fleet.record(started.key)).reader == 3
    answer = await started.worker.open(started.key, started.attempt, reader=3)
    assert answer.resumes
    await started.send(0, "ab")
    outcomes = await asyncio.gather(*(answer.until_text("ab") for answer in both), return_exceptions=True)
    assert sum(isinstance(outcome, Aborted) for outcome in outcomes) == 1


async def test_a_worker_that_asks_before_the_attach_has_answered_is_answered_then(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await command(fleet.redis, "CLIENT", "PAUSE", 300, "ALL")
    attached = gateway.attach(started.answer.request_id)
    # Both wait at Redis' door: the worker asks under the number that the attach is about to get.
    await started.worker.ask(started.key, started.attempt, reader=2)
    response = await started.worker.answer()
    await attached.accepted()
    if not response.resumes:  # it asked before the gateway had even seen the attach: nobody was arriving yet
        assert response.refusals[0].reason == delivery_pb2.REFUSAL_REASON_NO_READER
        response = await started.worker.open(started.key, started.attempt, reader=2)
    assert response.resumes


async def test_nobody_is_served_who_is_not_known_here(fleet: Fleet) -> None:
    worker = await fleet.link(await fleet.gateway())
    answer = await worker.open(fleet.key("nobody"), Attempt(1, "n"))
    assert answer.refusals[0].reason == delivery_pb2.REFUSAL_REASON_NO_READER


async def test_a_reader_that_a_restarted_gateway_forgot_is_told_to_the_record(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    payload = b""
    move = moves.Submit(fleet.key("old"), "digest", payload, 1, "n", gateway.fleet_address, 60_000, 0, 100)
    await fleet.store.submit(move)
    attempt = await fleet.place(fleet.key("old"))
    await (await fleet.link(gateway)).open(fleet.key("old"), attempt)
    await fleet.record_until(fleet.key("old"), lambda record: bool(record.reader_left_at_ms))


async def test_an_attach_may_leave_out_the_tokens_it_holds(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    tokens = tuple(tokens_of("abc"))
    await fleet.store.append([moves.Append(started.key, started.attempt, 0, 0, tokens)])
    await gateway.attach(started.answer.request_id, 2).accepted()
    answer = await started.worker.open(started.key, started.attempt, reader=2)
    (choice,) = answer.resumes[0].choices
    assert (choice.count, list(choice.token_ids)) == (2, tokens_of("ab")), "the journal knows them"


async def test_an_attach_that_leaves_a_gap_behind_what_the_fleet_knows_is_refused_and_changes_nothing(
    fleet: Fleet,
) -> None:
    first, other = await fleet.gateway(), await fleet.gateway()
    started = await fleet.started(first, request_id="running")
    await fleet.store.append([moves.Append(started.key, started.attempt, 0, 0, tuple(tokens_of("ab")))])
    await first.generate(request_id="queued").accepted()
    for answer, words in (
        (other.attach("running", 5), ("index 5", "2 tokens")),
        (other.attach("running", 5, "de"), ("index 3", "2 tokens")),
        (other.attach("queued", 1), ("index 1", "0 tokens")),
    ):
        error = await answer.error()
        assert isinstance(error, InvalidRequest)
        assert (error.reason, error.field) == ("HISTORY_GAP", "held_token_ids")
        assert all(word in error.message for word in words)
    assert (await fleet.record(started.key)).reader == 1
    await started.send(0, "ab")
    await started.answer.until_text("ab")


@pytest.mark.parametrize("held", ["abcde", "cde"])
async def test_a_client_that_holds_more_than_the_journal_states_it_and_goes_on(fleet: Fleet, held: str) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await fleet.store.append([moves.Append(started.key, started.attempt, 0, 0, tuple(tokens_of("ab")))])
    await gateway.attach(started.answer.request_id, 5, held).accepted()
    answer = await started.worker.open(started.key, started.attempt, reader=2)
    assert answer.resumes[0].choices[0].token_ids == tokens_of("abcde")


async def test_what_a_stream_here_was_given_is_known_though_it_is_not_journaled(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await started.send(0, "abcd")
    await started.answer.until_text("abcd")
    await fleet.requeue(started.key)
    await gateway.attach(started.answer.request_id, 3).accepted()
    assert (await fleet.record(started.key)).journal == (tuple(tokens_of("abc")),)


async def test_what_a_worker_is_about_to_journal_is_waited_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    started = await fleet.started(await fleet.gateway())
    read, journal = RequestStore.read, moves.Append(started.key, started.attempt, 0, 0, tuple(tokens_of("abcd")))

    async def read_just_before_it_is_journaled(self: RequestStore, key: RequestKey) -> tuple[Record, int] | None:
        found = await read(self, key)
        await self.append([journal])
        return found

    monkeypatch.setattr(RequestStore, "read", read_just_before_it_is_journaled)
    await (await fleet.gateway()).attach(started.answer.request_id, 4).accepted()
    assert (await fleet.record(started.key)).reader == 2


async def test_a_queued_request_follows_what_its_client_holds(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    request_id = await gateway.generate(request_id="a").accepted()
    await gateway.attach(request_id, 2, "xy").accepted()
    assert (await fleet.record(fleet.key("a"))).journal == (tuple(tokens_of("xy")),)


# Links


async def test_the_leader_is_told_once_that_the_stream_of_a_worker_broke_unless_its_session_ended(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    for worker, ended_well in (("well", True), ("gone", False), ("last", False)):
        link = await fleet.link(gateway)
        await fleet.directory.register(request_pb2.WorkerInfo(worker_id=worker), 60_000)
        await link.open(fleet.key("nobody"), Attempt(1, "n"), worker=worker)
        link.call.cancel()
        if ended_well:
            await fleet.directory.close(WorkerId(worker))
        else:
            async with asyncio.timeout(10):
                while worker not in await fleet.links_broken():
                    await asyncio.sleep(0.01)
    assert await fleet.links_broken() == ["gone", "last"]


# Ends


async def test_an_end_that_no_worker_tells_is_read_from_the_record(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    await started.answer.until_text("ab")
    await fleet.finish(started.key, started.attempt, "abcd")
    finished = await started.answer.end()
    assert (started.answer.text, finished.usage.completion_tokens) == ("abcd", 4)


async def test_frames_that_come_while_the_record_is_read_change_nothing(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    fleet.tokenizer.refuses = 2
    await fleet.finish(started.key, started.attempt, "abcd")
    for _ in range(20):
        await started.send(2, "cd")
    await started.worker.end(started.key, started.attempt, RequestState.FINISHED, 4)
    await started.answer.end()
    assert started.answer.text == "abcd"


async def test_a_stream_whose_text_is_not_that_of_the_end_says_where(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "abX")
    await started.answer.until_text("abX")
    await fleet.finish(started.key, started.attempt, "abcd")
    error = await started.answer.error()
    assert isinstance(error, Aborted)
    assert error.reason == "DIVERGED"
    assert "token 2" in error.message


@pytest.mark.parametrize("from_index", [0, 2, 4])
async def test_an_ended_request_is_replayed_from_any_token(fleet: Fleet, from_index: int) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await fleet.finish(started.key, started.attempt, "abcd")
    attached = gateway.attach(started.answer.request_id, from_index, "abcd"[:from_index])
    finished = await attached.end()
    assert attached.text == "abcd"[from_index:]
    assert finished.usage.completion_tokens == 4


async def test_an_attach_that_holds_another_text_than_the_end_is_told_where(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await fleet.finish(started.key, started.attempt, "abcd")
    for held, index in (("aX", 1), ("abcde", 4)):
        error = await gateway.attach(started.answer.request_id, len(held), held).error()
        assert isinstance(error, Aborted)
        assert error.reason == "DIVERGED"
        assert f"token {index}" in error.message


async def test_every_bad_end_has_its_own_error(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    for state, kind, reason in (
        (RequestState.EXPIRED, DeadlineExceeded, "EXPIRED"),
        (RequestState.FAILED, Internal, "FAILED"),
        (RequestState.QUARANTINED, Aborted, "POISONED"),
    ):
        started = await fleet.started(gateway)
        await started.send(0, "a")
        await fleet.finish(started.key, started.attempt, "a", state, "because")
        told = [await started.answer.error(), await gateway.attach(started.answer.request_id).error()]
        for error in told:
            assert isinstance(error, kind)
            assert error.reason == reason
        assert started.answer.text == "a", "what was generated before is kept"


async def test_a_cancelled_request_ends_its_stream_with_that_reason(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    answer = gateway.generate(request_id="a")
    await answer.accepted()
    response = await gateway.stub.Cancel(pb.CancelRequest(request_id="a"))
    assert response.state == pb.REQUEST_STATE_CANCELLED
    assert (await answer.end()).reason == pb.FINISH_REASON_CANCELLED
    again = await gateway.stub.Cancel(pb.CancelRequest(request_id="a"))
    assert again.state == pb.REQUEST_STATE_CANCELLED


async def test_what_never_was_cannot_be_read_on(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    await gateway.generate(request_id="a", tenant="acme").accepted()
    for answer in (gateway.attach("never"), gateway.attach("a"), gateway.attach("a", tenant="other")):
        assert isinstance(await answer.error(), NotFound)
    await gateway.attach("a", tenant="acme").accepted()


# Clients


async def test_a_client_that_hangs_up_is_noted_and_its_request_goes_on(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.send(0, "ab")
    await started.answer.until_text("ab")
    started.answer.call.cancel()
    record = await fleet.record_until(started.key, lambda record: bool(record.reader_left_at_ms))
    assert record.state in (RequestState.PLACED, RequestState.RUNNING)
    assert record.resume_ms == 30_000


async def test_a_client_that_reads_nothing_costs_bounded_memory_and_nobody_else_anything(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    slow = await fleet.started(gateway, request_id="slow", max_tokens=1900)
    quick = await fleet.started(gateway, request_id="quick", max_tokens=1900)
    piece = "x" * 19
    for round_ in range(100):
        frames = [frame(each.key, each.attempt, round_ * 19, piece) for each in (slow, quick)]
        # A token of ours is a character; a real one may be many: pad, so that HTTP/2's window fills.
        frames[0].delta.text = piece * 5_000
        frames[1].delta.text = piece
        await slow.worker.call.write(delivery_pb2.DeliverRequest(frames=frames[:1]))
        await quick.worker.call.write(delivery_pb2.DeliverRequest(frames=frames[1:]))
    await quick.answer.until_text(piece * 100)
    await slow.worker.end(slow.key, slow.attempt, RequestState.FINISHED, 1900)
    await slow.answer.end()
    assert len(slow.answer.text) == 100 * 5_000 * len(piece)
    assert slow.answer.tokens == tokens_of("x" * 1900)
    assert slow.answer.num_deltas < 50, "what waited was sent together"


async def test_a_stream_whose_reader_redis_lost_attaches_again(fleet: Fleet) -> None:
    first, second = await fleet.gateway(), await fleet.gateway()
    started = await fleet.started(first)
    attached = second.attach(started.answer.request_id)
    await attached.accepted()
    lost = await fleet.record(started.key)
    await fleet.rewrite(started.key, gateway=(await fleet.gateway()).fleet_address, reader=1)
    record = await fleet.record_until(started.key, lambda record: record.gateway == lost.gateway)
    assert record.reader == 2
    worker = await fleet.link(second)
    assert (await worker.open(started.key, started.attempt, reader=2)).resumes
    await worker.send(started.key, started.attempt, 0, "ab")
    await attached.until_text("ab")


async def test_a_stream_whose_readers_number_was_given_again_elsewhere_ends(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await fleet.rewrite(started.key, gateway=(await fleet.gateway()).fleet_address, reader=1)
    assert (await started.answer.error()).reason == "SUPERSEDED"


async def test_a_stream_is_not_ended_by_its_own_attach_whose_answer_was_lost(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await fleet.store.attach(moves.Attach(started.key, (await fleet.record(started.key)).gateway, ()))
    await fleet.record_until(started.key, lambda record: record.reader == 3)
    assert (await started.worker.open(started.key, started.attempt, reader=3)).resumes
    await started.send(0, "ab")
    await started.answer.until_text("ab")


async def test_an_attach_is_served_though_a_stream_here_has_a_number_that_redis_lost(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    earlier = [gateway.attach(started.answer.request_id) for _ in range(3)]
    for answer in earlier:
        await answer.accepted()
    await fleet.rewrite(started.key, (await fleet.record(started.key)).gateway, reader=1)
    last = gateway.attach(started.answer.request_id)
    await last.accepted()
    assert (await earlier[-1].error()).reason == "SUPERSEDED"
    reader = (await fleet.record(started.key)).reader
    assert (await started.worker.open(started.key, started.attempt, reader)).resumes
    await started.send(0, "ab")
    await last.until_text("ab")


async def test_whether_a_later_reader_counts_is_the_records_word_not_a_workers(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await started.worker.close(started.key, reader=5)
    await started.send(0, "ab")
    await started.answer.until_text("ab")
    await fleet.finish(started.key, started.attempt, "ab")
    await started.answer.end()


async def test_a_reader_that_was_wrongly_taken_for_gone_is_there_again(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway())
    await fleet.store.leave(moves.Leave(started.key, 1))
    record = await fleet.record_until(started.key, lambda record: record.reader == 2)
    assert not record.reader_left_at_ms
    answer = await started.worker.open(started.key, started.attempt, reader=2)
    assert answer.resumes
    await started.send(0, "ab")
    await started.answer.until_text("ab")
