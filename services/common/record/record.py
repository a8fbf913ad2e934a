"""The record of a request: what Redis holds of it."""

from dataclasses import dataclass

from services.common.ids import NO_WORKER, RequestKey, WorkerId
from services.common.record.states import ENDED, RequestState

MAX_DECISIONS = 100
"""Entries a decision record may have; the end is always added."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The fencing token: a number that is raised when a request is taken from a worker, and a nonce.

    The nonce tells apart two attempts that got the same number because Redis lost its last writes.
    """

    number: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing decided about a request. `at_ms` by the clock of Redis, since the epoch."""

    at_ms: int
    what: str
    attempt: int
    detail: str


@dataclass(frozen=True, slots=True)
class Record:
    """A request's whole state. Times are Redis' clock, ms since the epoch; 0 stands for never or none."""

    key: RequestKey
    state: RequestState
    attempt: Attempt
    digest: str
    """Of the caller's payload: the same id with another digest is refused."""
    payload: bytes
    """A serialized fleet.v1.RequestPayload."""
    num_choices: int
    accepted_at_ms: int
    deadline_at_ms: int
    resume_ms: int
    """How long it lives without a reader."""
    gateway: str
    """Id (`ids.GatewayId`) of the gateway that serves the reader."""
    reader: int
    """Number of the reader that counts, from 1; each Attach raises it."""
    reader_left_at_ms: int
    """When the reader left; 0: it is there."""
    journal: tuple[tuple[int, ...], ...]
    """Generated tokens of each choice."""
    tokens_per_minute: int = 0
    """Of its tenant, when it was accepted; 0: its tokens are not counted."""
    reserved_tokens: int = 0
    """What it took of these for its answer."""
    worker: WorkerId = NO_WORKER
    """Who has it, in PLACED and RUNNING."""
    placed_at_ms: int = 0
    """First placement."""
    ended_at_ms: int = 0
    cancel: bool = False
    """Somebody asked for its end while a worker had it."""
    suspect_until: int = 0
    """Tokens of any choice that must be journaled before it is no longer suspected of killing engines. 0: it is not."""
    outcome: bytes = b""
    """A serialized fleet.v1.Outcome, once ended by a worker; empty if it ended in the queue."""
    error: str = ""
    """Why it failed or was quarantined."""
    decisions: tuple[Decision, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether it has reached its one end."""
        return self.state in ENDED
