"""Where a request stands."""

from collections.abc import Mapping
from enum import StrEnum


class RequestState(StrEnum):
    """States of a request. Values are what Redis stores."""

    QUEUED = "queued"
    """In the pool's intake; no worker has it."""
    PLACED = "placed"
    """In a worker's inbox."""
    RUNNING = "running"
    """Its worker has written to its record."""
    FINISHED = "finished"
    """Ended by a stop or by its length."""
    CANCELLED = "cancelled"
    """Ended by a client, or because nobody read it."""
    EXPIRED = "expired"
    """Its deadline passed."""
    FAILED = "failed"
    """It can't be computed."""
    QUARANTINED = "quarantined"
    """An engine died while it ran alone."""


S = RequestState
ENDED: frozenset[RequestState] = frozenset({S.FINISHED, S.CANCELLED, S.EXPIRED, S.FAILED, S.QUARANTINED})
ON_WORKER: frozenset[RequestState] = frozenset({S.PLACED, S.RUNNING})

TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    S.QUEUED: frozenset({S.PLACED, S.CANCELLED, S.EXPIRED}),
    S.PLACED: frozenset({S.RUNNING, S.QUEUED}) | ENDED,
    S.RUNNING: frozenset({S.QUEUED}) | ENDED,
    S.FINISHED: frozenset(),
    S.CANCELLED: frozenset(),
    S.EXPIRED: frozenset(),
    S.FAILED: frozenset(),
    S.QUARANTINED: frozenset(),
}


class IllegalTransitionError(Exception):
    """A defect: code tried a move between states that the table does not have."""


def check(before: RequestState, after: RequestState) -> RequestState:
    """Return `after` if the table allows it (or nothing changes). Raises IllegalTransitionError."""
    if before != after and after not in TRANSITIONS[before]:
        raise IllegalTransitionError(f"{before} -> {after}")
    return after
