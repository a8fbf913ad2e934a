"""Which worker takes the next request: the one with most room."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.common.ids import WorkerId
from services.common.store.intake import Queued
from services.scheduler.ledger import Account, Reservation


@dataclass(frozen=True, slots=True)
class Placement:
    """A request, the worker it goes to, and what it takes there."""

    queued: Queued
    worker: WorkerId
    reservation: Reservation


def next_placement(in_order: Iterable[Queued], accounts: Iterable[Account]) -> Placement | None:
    """The first request, in this order, that a worker has room for now. None: all wait.

    Nobody is overtaken on a worker that could ever hold it: such a worker is left to the first that waits for it.
    So a long request waits for one worker's room at most, and short ones behind it still fill the others.
    """
    unclaimed = {account.worker: account for account in accounts}
    for queued in in_order:
        if not unclaimed:
            return None
        reservation = Reservation.of(queued)
        worker = most_room(unclaimed.values(), reservation)
        if worker is not None:
            return Placement(queued, worker, reservation)
        for claimed in [account.worker for account in unclaimed.values() if account.could_hold(reservation)]:
            del unclaimed[claimed]
    return None


def most_room(accounts: Iterable[Account], reservation: Reservation) -> WorkerId | None:
    """Among the workers that grant the reservation, the one with most free blocks, then least prefill to come."""
    granting = [account for account in accounts if account.grants(reservation)]
    if not granting:
        return None
    best = max(
        granting,
        key=lambda account: (
            account.num_free_blocks,
            -account.prefill_backlog_tokens,
            -account.num_sequences,
            account.worker,
        ),
    )
    return best.worker
