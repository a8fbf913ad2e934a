"""Requests are placed in the order of their acceptance, whatever happened to them since."""

from hypothesis import given
from hypothesis import strategies as st

from services.common.record.record import Attempt
from services.scheduler.deadlines import SLACK, Deadlines
from services.scheduler.ordering import Queue
from tests.unit.scheduler_builders import a_queued


def names(queue: Queue) -> list[str]:
    return [queued.key.removeprefix("acme/") for queued in queue.in_order()]


def test_the_first_accepted_is_the_first() -> None:
    queue = Queue()
    queue.add(a_queued("late", accepted_at_ms=20, entry_id="20-0"))
    queue.add(a_queued("early", accepted_at_ms=10, entry_id="10-0"))
    assert names(queue) == ["early", "late"]


def test_a_requeued_request_goes_before_those_accepted_since() -> None:
    queue = Queue()
    queue.add(a_queued("waiting", accepted_at_ms=20, entry_id="20-0"))
    queue.add(a_queued("requeued", accepted_at_ms=10, attempt=2, entry_id="90-0"))
    assert names(queue) == ["requeued", "waiting"]


def test_requests_of_one_millisecond_keep_the_order_of_the_intake() -> None:
    queue = Queue()
    for number in (10, 9, 11):
        queue.add(a_queued(f"r{number}", accepted_at_ms=5, entry_id=f"5-{number}"))
    assert names(queue) == ["r9", "r10", "r11"]


def test_a_newer_attempt_replaces_an_older_one_and_not_the_reverse() -> None:
    queue = Queue()
    queue.add(a_queued("r", attempt=2, entry_id="2-0"))
    queue.add(a_queued("r", attempt=1, entry_id="1-0"))
    assert [queued.attempt.number for queued in queue.in_order()] == [2]
    queue.add(a_queued("r", attempt=3, entry_id="3-0"))
    assert [queued.attempt.number for queued in queue.in_order()] == [3]


def test_dropping_an_older_attempt_keeps_the_newer_one() -> None:
    queue = Queue()
    queued = a_queued("r", attempt=2)
    queue.add(queued)
    queue.drop(queued.key, Attempt(1, "n1"))
    assert names(queue) == ["r"]
    queue.drop(queued.key, queued.attempt)
    assert len(queue) == 0
    assert names(queue) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(1, 3), st.booleans())))
def test_the_queue_is_always_sorted_and_holds_each_request_once(
    operations: list[tuple[int, int, int, bool]],
) -> None:
    queue = Queue()
    model: dict[str, tuple[int, int, int]] = {}
    for position, (name, accepted_at_ms, attempt, add) in enumerate(operations):
        queued = a_queued(f"r{name}", accepted_at_ms=accepted_at_ms, attempt=attempt, entry_id=f"1-{position}")
        known = model.get(queued.key)
        if add:
            queue.add(queued)
            if known is None or known[2] <= attempt:
                model[queued.key] = (accepted_at_ms, position, attempt)
        else:
            queue.drop(queued.key, queued.attempt)
            if known is not None and known[2] == attempt:
                del model[queued.key]
    assert [queued.key for queued in queue.in_order()] == sorted(model, key=lambda key: model[key][:2])
    assert len(queue) == len(model)


def test_deadlines_come_due_in_their_order_and_a_request_once() -> None:
    deadlines = Deadlines()
    first, second = a_queued("first").key, a_queued("second").key
    deadlines.add(second, 20)
    deadlines.add(first, 10)
    deadlines.add(first, 15)
    assert deadlines.take_due(9, 100) == []
    assert deadlines.take_due(20, 100) == [first, second]
    assert deadlines.take_due(99, 100) == []


def test_deadlines_of_ended_requests_are_forgotten_before_they_are_many() -> None:
    deadlines = Deadlines()
    for number in range(2 * SLACK):
        deadlines.add(a_queued(f"r{number}").key, 1000 + number)
    live = a_queued("r7").key
    deadlines.prune({live})
    assert len(deadlines) == 1
    assert deadlines.take_due(9999, 100) == [live]
