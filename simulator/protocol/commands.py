"""Everything a process may ask of Redis beside the moves of the protocol, and what Redis says back."""

from enum import Enum
from typing import NamedTuple

from services.common.ids import RequestKey, WorkerId
from services.common.record import moves
from services.common.record.history import Held
from services.common.record.record import Attempt


class Trouble(Enum):
    """What a command may get instead of an answer."""

    LOST = "lost"
    """The connection died: it may have run, may run later, or never."""
    RECOVERING = "recovering"
    """Redis restarted, and the leader has not finished recovery."""


LOST = Trouble.LOST
RECOVERING = Trouble.RECOVERING


class Spec(NamedTuple):
    """A request's payload, as far as the protocol cares."""

    max_tokens: int
    num_choices: int
    poison_after: int
    """Engines die once it has this many tokens; -1: never."""


class Appends(NamedTuple):
    """One flush of a worker: one script."""

    moves: tuple[moves.Append, ...]


class Sweeps(NamedTuple):
    """One round of the leader's clock: one script."""

    moves: tuple[moves.Sweep, ...]


class Read(NamedTuple):
    """Whole records. Answer: dict of those that exist."""

    keys: tuple[RequestKey, ...]


class Start(NamedTuple):
    """Inbox: run this."""

    key: RequestKey
    attempt: Attempt
    gateway: str
    reader: int
    journal: tuple[tuple[int, ...], ...]
    remaining_ms: int
    """0: no deadline."""
    suspect_until: int


class CancelAttempt(NamedTuple):
    """Inbox: end this attempt, or forget it."""

    key: RequestKey
    attempt: Attempt


class Redirect(NamedTuple):
    """Inbox: another reader counts from now on."""

    key: RequestKey
    attempt: Attempt
    gateway: str
    reader: int


class ReadInbox(NamedTuple):
    """Blocking. Answer: [(entry id, Start | CancelAttempt | Redirect)] after an entry id."""

    worker: WorkerId
    after: int


class Outstanding(NamedTuple):
    """Answer: {key: attempt} of the Start entries of a worker that are not released."""

    worker: WorkerId


class Queued(NamedTuple):
    """An entry of the intake."""

    entry_id: int
    key: RequestKey
    attempt: Attempt


class Released(NamedTuple):
    """Event: a reservation is free."""

    entry_id: int
    key: RequestKey
    worker: WorkerId


class Report(NamedTuple):
    """Event and command: a worker's progress. Answer: Reported."""

    worker: WorkerId
    steps: int
    in_flight: bool
    """A step is being computed."""


class Reported(NamedTuple):
    """`registered` False: register again, if still a member, else start a new session. `recovering`: the run id to post
    holdings for; 0: none."""

    registered: bool
    is_member: bool
    recovering: int


class Registered(NamedTuple):
    """Event: a worker came."""

    entry_id: int
    worker: WorkerId


class ReadPool(NamedTuple):
    """Blocking; the leader's. Answer: entries of intake and events after an entry id, in order."""

    after: int


class Register(NamedTuple):
    """A worker's registration."""

    worker: WorkerId


class Close(NamedTuple):
    """A worker takes nothing more; what it has stays in its inbox."""

    worker: WorkerId


class Retire(NamedTuple):
    """Removes a worker and its inbox, unless Start entries are outstanding in it. Answer: whether it did.

    With a fence: by the leader. Without: by the worker's own front.
    """

    worker: WorkerId
    fence: str = ""


class Acquire(NamedTuple):
    """Takes or renews the leader's lease. Answer: Lease or None."""

    holder: str
    known_epoch: int


class Lease(NamedTuple):
    """A reign. `recovering`: the run id that needs recovery; 0: none."""

    epoch: int
    fence: str
    recovering: int
    run_id: int


class Rebuild(NamedTuple):
    """What a new leader reads. Answer: View."""


class View(NamedTuple):
    """The pool as Redis knows it: the intake, and the outstanding entries of each member of the workers' set."""

    last_entry_id: int
    queue: tuple[Queued, ...]
    held: dict[WorkerId, tuple[RequestKey, ...]]


class Survey(NamedTuple):
    """The leader's look at leases. Answer: Surveyed."""

    keys: tuple[RequestKey, ...]


class Surveyed(NamedTuple):
    """Workers whose registration expired, and readers whose gateway's lease expired."""

    expired: tuple[WorkerId, ...]
    unread: tuple[moves.Leave, ...]


class Beat(NamedTuple):
    """A gateway's lease. Answer: Beaten."""

    gateway: str


class Beaten(NamedTuple):
    """`was_alive`: the lease had not lapsed. `run_id`: of this Redis. `recovering`: as in Reported."""

    was_alive: bool
    run_id: int
    recovering: int


class HeldRequest(NamedTuple):
    """A request as a worker or a gateway knows it."""

    key: RequestKey
    attempt: Attempt | None
    """Gateway: the one opened last."""
    runs_here: bool
    held: tuple[Held, ...]
    restore: moves.Restore | None
    """Gateway: how to put it back; the leader fills in fence, nonce and floor."""


class Post(NamedTuple):
    """What a process holds after a restart of Redis."""

    run_id: int
    holder: str
    requests: tuple[HeldRequest, ...]


class Posted(NamedTuple):
    """Answer: {holder: requests} posted for a run id."""

    run_id: int


class Forget(NamedTuple):
    """Drop what was posted for a run id."""

    run_id: int


class Unfinished(NamedTuple):
    """Answer: every record that has not ended."""


class Complete(NamedTuple):
    """Recovery is done. Answer: whether the fence still counts."""

    run_id: int
    fence: str
