"""The next request goes where most room is; nobody is overtaken on a worker that could hold it."""

from services.scheduler.ledger import Ledger
from services.scheduler.placement import next_placement
from tests.unit.scheduler_builders import W1, W2, a_queued, a_reservation, an_info


def two_workers(blocks_1: int, blocks_2: int) -> Ledger:
    ledger = Ledger()
    ledger.open(an_info(W1, num_blocks=blocks_1))
    ledger.open(an_info(W2, num_blocks=blocks_2))
    return ledger


def test_the_worker_with_most_free_blocks_is_chosen() -> None:
    ledger = two_workers(10, 10)
    ledger.reserve(W2, a_reservation("other"))
    placement = next_placement([a_queued()], ledger.accounts.values())
    assert placement is not None
    assert placement.worker == W1


def test_without_workers_all_wait() -> None:
    assert next_placement([a_queued()], []) is None


def test_a_short_request_does_not_overtake_a_long_one_on_the_worker_that_the_long_one_waits_for() -> None:
    ledger = two_workers(10, 1)
    ledger.reserve(W1, a_reservation("other"))
    ledger.reserve(W2, a_reservation("another"))
    long = a_queued("long", max_tokens=155)
    assert next_placement([long, a_queued("short")], ledger.accounts.values()) is None


def test_a_short_request_takes_a_worker_that_the_long_one_cannot_use() -> None:
    ledger = two_workers(10, 1)
    ledger.reserve(W1, a_reservation("other"))
    long = a_queued("long", max_tokens=155)
    placement = next_placement([long, a_queued("short")], ledger.accounts.values())
    assert placement is not None
    assert (placement.queued.key, placement.worker) == ("acme/short", W2)


def test_a_request_that_no_worker_could_hold_holds_nobody_up() -> None:
    ledger = two_workers(4, 4)
    never = a_queued("never", max_tokens=10_000)
    placement = next_placement([never, a_queued("next")], ledger.accounts.values())
    assert placement is not None
    assert placement.queued.key == "acme/next"
