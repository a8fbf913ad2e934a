"""The leader's view follows Redis: a request is counted where it is, once, whatever the leader had heard."""

from services.common.ids import NO_WORKER, RequestKey, WorkerId
from services.common.record.record import Attempt
from services.common.record.states import RequestState
from services.common.store.requests import Peek
from services.scheduler.liveness import Patience
from services.scheduler.view import Live, View
from tests.unit.scheduler_builders import W1, a_queued, a_reservation, an_info

KEY = RequestKey("acme/r1")


def a_view() -> View:
    view = View(Patience())
    view.add_worker(an_info(num_blocks=1), (), now_ms=0)
    return view


def a_peek(state: RequestState, worker: WorkerId = NO_WORKER, attempt: int = 1) -> Peek:
    return Peek(state, 1, Attempt(attempt, f"n{attempt}"), worker, "gateway:1", 0, 1000, "")


def test_a_request_that_a_worker_has_is_counted_once_even_without_room() -> None:
    view = a_view()
    view.found(W1, a_reservation("other"), now_ms=0)
    for _ in range(2):
        view.found(W1, a_reservation("r1"), now_ms=0)
    account = view.ledger.accounts[W1]
    assert (list(account.reservations), account.num_reserved_blocks) == (["acme/other", "acme/r1"], 2)
    assert view.liveness.next_due_ms() == 1000, "from now on it has work"


def test_a_request_that_waits_as_far_as_is_known_and_that_a_worker_has_is_left_to_its_placing() -> None:
    view, waiting = a_view(), Live(KEY, a_queued().attempt, NO_WORKER)
    assert view.agrees(waiting, a_peek(RequestState.QUEUED))
    assert view.agrees(waiting, a_peek(RequestState.PLACED, W1))
    assert not view.agrees(waiting, a_peek(RequestState.QUEUED, attempt=2))
    assert not view.agrees(waiting, a_peek(RequestState.CANCELLED))


def test_a_request_that_left_its_worker_is_not_there() -> None:
    view, placed = a_view(), Live(KEY, a_queued().attempt, W1)
    assert view.agrees(placed, a_peek(RequestState.RUNNING, W1))
    assert not view.agrees(placed, a_peek(RequestState.RUNNING, WorkerId("w-2")))
    assert not view.agrees(placed, a_peek(RequestState.FINISHED))
    assert not view.agrees(placed, a_peek(RequestState.QUEUED, attempt=2))
