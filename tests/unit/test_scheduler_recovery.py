"""After Redis lost its last writes: who is left alone, who is raised above what was seen, who is put back."""

from dataclasses import replace

from gen.shoal.fleet.v1.request_pb2 import HeldRequest, Holdings, RequestPayload
from gen.shoal.inference.v1.inference_pb2 import TokenIds
from services.common.ids import NO_WORKER, RequestKey
from services.common.record.record import Attempt, Record
from services.common.record.states import RequestState
from services.scheduler.recovery import Claims, restoration
from tests.unit.scheduler_builders import W1, W2

KEY = RequestKey("acme/r1")
RUNNING = Record(
    key=KEY,
    state=RequestState.RUNNING,
    attempt=Attempt(2, "n2"),
    digest="digest",
    payload=b"",
    num_choices=1,
    accepted_at_ms=1,
    deadline_at_ms=0,
    resume_ms=0,
    gateway="gateway:1",
    reader=1,
    reader_left_at_ms=0,
    journal=((),),
    worker=W1,
)


def held(number: int, nonce: str, runs_here: bool, reader: int = 0) -> HeldRequest:
    request = HeldRequest(key=KEY, attempt=number, nonce=nonce, runs_here=runs_here, reader=reader)
    if not runs_here:
        request.payload.CopyFrom(RequestPayload(n=2))
    return request


def claims(**stated: HeldRequest) -> Claims:
    return Claims([Holdings(holder=holder.replace("_", "-"), requests=[request]) for holder, request in stated.items()])


def test_what_its_worker_states_exactly_is_left_alone() -> None:
    assert claims(w_1=held(2, "n2", True)).confirm(RUNNING)
    assert claims(w_1=held(2, "n2", True), gateway=held(1, "n1", False)).confirm(RUNNING)


def test_what_nobody_states_is_raised() -> None:
    assert not claims().confirm(RUNNING)
    assert claims().next_number(KEY) == 1


def test_what_another_worker_runs_is_raised() -> None:
    assert not claims(w_2=held(2, "n2", True)).confirm(RUNNING)
    assert not claims(w_1=held(2, "n2", True)).confirm(replace(RUNNING, worker=W2))


def test_a_higher_attempt_anywhere_raises_above_it() -> None:
    stated = claims(w_1=held(2, "n2", True), gateway=held(5, "n5", False))
    assert not stated.confirm(RUNNING)
    assert stated.next_number(KEY) == 6


def test_the_same_number_with_another_nonce_is_another_attempt() -> None:
    assert not claims(w_1=held(2, "other", True)).confirm(RUNNING)
    assert not claims(w_1=held(2, "n2", True), gateway=held(2, "other", False)).confirm(RUNNING)


def test_a_placement_that_redis_lost_is_raised() -> None:
    queued = replace(RUNNING, state=RequestState.QUEUED, worker=NO_WORKER)
    assert not claims(w_1=held(2, "n2", True)).confirm(queued)


def test_only_the_reader_that_the_record_names_counts_as_there() -> None:
    def stated(gateway: str, reader: int) -> Claims:
        request = held(2, "n2", runs_here=False, reader=reader)
        request.gateway = gateway
        return claims(a=request)

    assert stated("gateway:1", 1).is_read(RUNNING)
    assert not stated("gateway:1", 2).is_read(RUNNING)
    assert not stated("gateway:2", 1).is_read(RUNNING)
    assert not claims(w_1=held(2, "n2", True)).is_read(RUNNING)


def test_what_redis_lost_is_put_back_from_its_last_reader() -> None:
    stated = claims(a=held(1, "n1", False, reader=1), b=held(1, "n1", False, reader=2), w_1=held(3, "n3", True))
    assert [request.reader for request in stated.lost(set())] == [2]
    assert list(stated.lost({KEY})) == []


def test_what_only_a_worker_holds_cannot_be_put_back() -> None:
    assert list(claims(w_1=held(1, "n1", True)).lost(set())) == []


def test_it_is_put_back_behind_the_tokens_that_its_client_was_given() -> None:
    request = held(1, "n1", False, reader=3)
    request.choices.append(TokenIds(ids=[7, 8]))
    move = restoration(request, "1:me", "new", floor=4)
    assert move.journal == ((7, 8), ())
    assert (move.floor, move.reader, move.fence, move.nonce) == (4, 3, "1:me", "new")
