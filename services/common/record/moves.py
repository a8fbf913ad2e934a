"""Everything that may be asked of a request record. One class a move; one Lua script a move."""

from dataclasses import dataclass

from services.common.ids import RequestKey, WorkerId
from services.common.record.history import Held
from services.common.record.record import Attempt
from services.common.record.states import RequestState


@dataclass(frozen=True, slots=True)
class Submit:
    """A gateway accepts a request: its record comes into being, QUEUED under attempt 1."""

    key: RequestKey
    digest: str
    payload: bytes
    num_choices: int
    nonce: str
    gateway: str
    resume_ms: int
    deadline_ms: int
    """From now; 0: none."""
    backlog_limit: int
    """Most entries of the intake."""
    tenant_limit: int = 0
    """Most requests of its tenant in flight in the pool; 0: any number."""
    tokens_per_minute: int = 0
    """Tokens a minute that its tenant may take in the pool; 0: any number, and these are not counted."""
    prompt_tokens: int = 0
    """Tokens that it takes for good."""
    reserved_tokens: int = 0
    """Tokens that it may generate: taken at once, and what it did not generate is given back at its end."""


@dataclass(frozen=True, slots=True)
class Place:
    """The leader gives a queued request, under its current attempt, to a worker's inbox."""

    key: RequestKey
    fence: str
    """The leader's `<epoch>:<holder>`."""
    attempt: Attempt
    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Append:
    """A worker appends generated tokens; with no tokens it says that it runs the request. Idempotent by index."""

    key: RequestKey
    attempt: Attempt
    choice: int
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """A worker's front writes the end. `tails`, for each choice: (start, tokens) up to the last token."""

    key: RequestKey
    attempt: Attempt
    state: RequestState
    tails: tuple[tuple[int, tuple[int, ...]], ...]
    outcome: bytes
    error: str = ""


@dataclass(frozen=True, slots=True)
class Requeue:
    """A request is taken from its worker: by the leader (fence set), or by the worker's own front (fence empty)."""

    key: RequestKey
    attempt: Attempt
    """The attempt that is taken away."""
    nonce: str
    """Of the attempt that follows."""
    why: str
    fence: str = ""
    floor: int = 0
    """The next attempt's number is at least this: somebody has seen higher ones."""
    suspect_until: int = 0
    """Not 0: it was in the step in flight when an engine died, having generated about this many tokens."""


@dataclass(frozen=True, slots=True)
class Rebase:
    """A worker's front found that the reader holds another history: the request goes on from the reader's own."""

    key: RequestKey
    attempt: Attempt
    nonce: str
    journal: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """A client (or the leader, for want of a reader) asks for the end."""

    key: RequestKey
    why: str


@dataclass(frozen=True, slots=True)
class Attach:
    """A gateway reads on for a client. The last one wins."""

    key: RequestKey
    gateway: str
    held: tuple[Held, ...]
    """For each choice that the client speaks of, from choice 0."""


@dataclass(frozen=True, slots=True)
class Leave:
    """A reader went away: its client hung up, or (said by the leader) its gateway died."""

    key: RequestKey
    reader: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """The leader's clock: ends what expired in the queue, and cancels what nobody has read for its resume time."""

    key: RequestKey
    fence: str


@dataclass(frozen=True, slots=True)
class Restore:
    """In recovery, the leader puts back a request that Redis lost and a gateway still serves."""

    key: RequestKey
    fence: str
    digest: str
    payload: bytes
    num_choices: int
    nonce: str
    gateway: str
    reader: int
    resume_ms: int
    accepted_at_ms: int
    deadline_at_ms: int
    journal: tuple[tuple[int, ...], ...]
    floor: int
    """Number of its attempt: above every one that anybody has seen."""


@dataclass(frozen=True, slots=True)
class Recover:
    """In recovery, the leader raises a live request's attempt above every one that anybody has seen."""

    key: RequestKey
    fence: str
    nonce: str
    floor: int


Move = Submit | Place | Append | Finish | Requeue | Rebase | Cancel | Attach | Leave | Sweep | Restore | Recover
