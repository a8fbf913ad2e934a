"""The protocol: record + move -> record + effects + answer. Pure; docs/protocol.md in code.

Redis runs the same, one Lua script a move (`services/common/store/lua/<move>.lua`); random histories test the two
against each other, and `simulator/protocol` tests this code under crashes, delays and lost writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from services.common.ids import NO_WORKER, RequestKey, WorkerId
from services.common.record import moves
from services.common.record.history import Held, beyond, difference_from_end, first_difference, rebased
from services.common.record.record import MAX_DECISIONS, Attempt, Decision, Record
from services.common.record.states import ON_WORKER, RequestState, check
from services.common.record.token_budget import given_back, short_ms, taken


class Verdict(StrEnum):
    """A move's answer in a word. Values are what scripts return."""

    OK = "ok"
    KNOWN = "known"
    """Submit: this very request is known; attach to it."""
    CONFLICT = "conflict"
    """Submit: the id is in use with another payload."""
    FULL = "full"
    """Submit: the intake is at its limit."""
    QUOTA = "quota"
    """Submit: its tenant is at its limit of requests in flight."""
    TOKENS = "tokens"
    """Submit: its tenant has not so many tokens now; it will in `index` ms, unless it takes others meanwhile."""
    UNKNOWN = "unknown"
    """No such request."""
    STALE = "stale"
    """The attempt (or reader) is no longer the one that counts."""
    ENDED = "ended"
    """It has ended; nothing changed."""
    NOT_LEADER = "not_leader"
    """The fence is not the current leader's."""
    NO_WORKER = "no_worker"
    """Place: the worker is not registered."""
    GAP = "gap"
    """Append, Finish: tokens before `index` are missing in the journal of `choice`."""
    DIVERGED = "diverged"
    """Attach: it has ended, and differs from what the client holds of `choice` at `index`."""
    CANCEL = "cancel"
    """Append: done, and somebody asked for the end."""
    IDLE = "idle"
    """Sweep: nothing was due."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the caller of a move is told."""

    verdict: Verdict
    choice: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class EnterIntake:
    """The request is the last entry of the pool's intake."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class LeaveIntake:
    """Its entry in the intake is deleted."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class SendStart:
    """The worker's inbox gets the request, as the record now stands."""

    key: RequestKey
    worker: WorkerId


@dataclass(frozen=True, slots=True)
class SendCancel:
    """The worker's inbox is told to end an attempt, or to forget it."""

    key: RequestKey
    worker: WorkerId
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SendRedirect:
    """The worker's inbox is told who reads now."""

    key: RequestKey
    worker: WorkerId
    attempt: Attempt
    gateway: str
    reader: int


@dataclass(frozen=True, slots=True)
class Release:
    """The Start entry leaves the worker's inbox, and the events say that its reservation is free."""

    key: RequestKey
    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Retain:
    """The record and its journal expire after the retention time, and it is no longer in flight."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class TokensBackAt:
    """All tokens that the request's tenant took will have come back at this time; in the past: it has all of them."""

    key: RequestKey
    at_ms: int


Effect = EnterIntake | LeaveIntake | SendStart | SendCancel | SendRedirect | Release | Retain | TokensBackAt


@dataclass(frozen=True, slots=True)
class Pool:
    """What a move needs to know beside the record, read in the same atomic step."""

    now_ms: int
    fence: str
    """The current leader's; empty: none."""
    intake_length: int
    workers: frozenset[WorkerId]
    """Those registered."""
    tenant_in_flight: int = 0
    """Requests of the move's tenant that have not ended."""
    tokens_back_at_ms: int = 0
    """When all tokens that this tenant took will have come back; in the past: they have."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What a move did."""

    record: Record | None
    answer: Answer
    effects: tuple[Effect, ...] = ()


def apply(record: Record | None, move: moves.Move, pool: Pool) -> Transition:
    """Make one move. Raises IllegalTransitionError only by a defect; every refusal is an answer."""
    match move:
        case moves.Submit():
            return _submit(record, move, pool)
        case moves.Restore():
            return _restore(record, move, pool)
    if record is None:
        return Transition(None, Answer(Verdict.UNKNOWN))
    match move:
        case moves.Place():
            return _place(record, move, pool)
        case moves.Append():
            return _append(record, move, pool)
        case moves.Finish():
            return _finish(record, move, pool)
        case moves.Requeue():
            return _requeue(record, move, pool)
        case moves.Rebase():
            return _rebase(record, move, pool)
        case moves.Cancel():
            return _cancel(record, move.why, pool)
        case moves.Attach():
            return _attach(record, move, pool)
        case moves.Leave():
            return _leave(record, move, pool)
        case moves.Sweep():
            return _sweep(record, move, pool)
        case moves.Recover():
            return _recover(record, move, pool)


def _submit(record: Record | None, move: moves.Submit, pool: Pool) -> Transition:
    if record is not None:
        same = record.digest == move.digest
        return _unchanged(record, Verdict.KNOWN if same else Verdict.CONFLICT)
    # The tenant's own limit first: a caller that is over it shall not take the whole fleet for full.
    if 0 < move.tenant_limit <= pool.tenant_in_flight:
        return Transition(None, Answer(Verdict.QUOTA, index=pool.tenant_in_flight))
    limited = move.tokens_per_minute > 0
    tokens = move.prompt_tokens + move.reserved_tokens
    back_at_ms = taken(pool.tokens_back_at_ms, pool.now_ms, tokens, move.tokens_per_minute) if limited else 0
    if short_ms(back_at_ms, pool.now_ms) > 0:
        return Transition(None, Answer(Verdict.TOKENS, index=short_ms(back_at_ms, pool.now_ms)))
    if pool.intake_length >= move.backlog_limit:
        return Transition(None, Answer(Verdict.FULL, index=pool.intake_length))
    created = Record(
        key=move.key,
        state=RequestState.QUEUED,
        attempt=Attempt(1, move.nonce),
        digest=move.digest,
        payload=move.payload,
        num_choices=move.num_choices,
        accepted_at_ms=pool.now_ms,
        deadline_at_ms=pool.now_ms + move.deadline_ms if move.deadline_ms else 0,
        resume_ms=move.resume_ms,
        gateway=move.gateway,
        reader=1,
        reader_left_at_ms=0,
        journal=((),) * move.num_choices,
        tokens_per_minute=move.tokens_per_minute,
        reserved_tokens=move.reserved_tokens if limited else 0,
    )
    taking: tuple[Effect, ...] = (TokensBackAt(move.key, back_at_ms),) if limited else ()
    effects = (EnterIntake(move.key), *taking)
    return Transition(_decided(created, pool, "accepted", move.gateway), Answer(Verdict.OK), effects)


def _restore(record: Record | None, move: moves.Restore, pool: Pool) -> Transition:
    if not _leads(move.fence, pool):
        return Transition(record, Answer(Verdict.NOT_LEADER))
    if record is not None:
        return _unchanged(record, Verdict.KNOWN)
    created = Record(
        key=move.key,
        state=RequestState.QUEUED,
        attempt=Attempt(move.floor, move.nonce),
        digest=move.digest,
        payload=move.payload,
        num_choices=move.num_choices,
        accepted_at_ms=move.accepted_at_ms,
        deadline_at_ms=move.deadline_at_ms,
        resume_ms=move.resume_ms,
        gateway=move.gateway,
        reader=move.reader,
        reader_left_at_ms=0,
        journal=move.journal,
    )
    return Transition(_decided(created, pool, "restored", move.gateway), Answer(Verdict.OK), (EnterIntake(move.key),))


def _place(record: Record, move: moves.Place, pool: Pool) -> Transition:
    if not _leads(move.fence, pool):
        return _unchanged(record, Verdict.NOT_LEADER)
    if record.ended:
        return _unchanged(record, Verdict.ENDED)
    if record.state != RequestState.QUEUED or record.attempt != move.attempt:
        return _unchanged(record, Verdict.STALE)
    if _expired(record, pool):
        return _end_in_queue(record, RequestState.EXPIRED, "deadline", pool)
    if move.worker not in pool.workers:
        return _unchanged(record, Verdict.NO_WORKER)
    placed = replace(
        record,
        state=check(record.state, RequestState.PLACED),
        worker=move.worker,
        placed_at_ms=record.placed_at_ms or pool.now_ms,
    )
    effects = (LeaveIntake(record.key), SendStart(record.key, move.worker))
    return Transition(_decided(placed, pool, "placed", move.worker), Answer(Verdict.OK), effects)


def _append(record: Record, move: moves.Append, pool: Pool) -> Transition:
    refusal = _not_this_attempt(record, move.attempt)
    if refusal:
        return refusal
    known = record.journal[move.choice]
    if move.start > len(known):
        return Transition(record, Answer(Verdict.GAP, move.choice, len(known)))
    running = _journaled(record, move.choice, move.start, move.tokens)
    if record.state == RequestState.PLACED:
        running = _decided(
            replace(running, state=check(record.state, RequestState.RUNNING)), pool, "running", record.worker
        )
    verdict = Verdict.CANCEL if record.cancel else Verdict.OK
    return Transition(running, Answer(verdict, move.choice, len(running.journal[move.choice])))


def _finish(record: Record, move: moves.Finish, pool: Pool) -> Transition:
    refusal = _not_this_attempt(record, move.attempt)
    if refusal:
        return refusal
    for choice, (start, _) in enumerate(move.tails):
        if start > len(record.journal[choice]):
            return Transition(record, Answer(Verdict.GAP, choice, len(record.journal[choice])))
    finished = record
    for choice, (start, tokens) in enumerate(move.tails):
        finished = _journaled(finished, choice, start, tokens)
    finished = replace(finished, outcome=move.outcome)
    return _end_on_worker(finished, move.state, move.error, pool, NO_NOTICE)


def _requeue(record: Record, move: moves.Requeue, pool: Pool) -> Transition:
    if move.fence and not _leads(move.fence, pool):
        return _unchanged(record, Verdict.NOT_LEADER)
    refusal = _not_this_attempt(record, move.attempt)
    if refusal:
        return refusal
    # Whoever is asked to give the request up shall drop it: a worker that is only slow would compute for nobody.
    notice = (SendCancel(record.key, record.worker, record.attempt),) if move.fence else NO_NOTICE
    if record.cancel:
        return _end_on_worker(record, RequestState.CANCELLED, "", pool, notice)
    if _expired(record, pool):
        return _end_on_worker(record, RequestState.EXPIRED, "", pool, notice)
    if move.suspect_until and record.suspect_until:
        error = "its engine died twice, the second time while it ran alone"
        return _end_on_worker(record, RequestState.QUARANTINED, error, pool, notice)
    # The attempt is raised here; the journal is read only when the request is placed again, so no write is missed.
    number = max(record.attempt.number + 1, move.floor)
    queued = replace(
        record,
        state=check(record.state, RequestState.QUEUED),
        attempt=Attempt(number, move.nonce),
        worker=NO_WORKER,
        suspect_until=move.suspect_until or record.suspect_until,
    )
    effects = (Release(record.key, record.worker), *notice, EnterIntake(record.key))
    return Transition(_decided(queued, pool, "requeued", move.why), Answer(Verdict.OK, index=number), effects)


def _recover(record: Record, move: moves.Recover, pool: Pool) -> Transition:
    if not _leads(move.fence, pool):
        return _unchanged(record, Verdict.NOT_LEADER)
    if record.state in ON_WORKER:
        why = "Redis lost its last writes"
        return _requeue(
            record, moves.Requeue(record.key, record.attempt, move.nonce, why, move.fence, move.floor), pool
        )
    if record.ended:
        return _unchanged(record, Verdict.ENDED)
    # Its placement may be among the lost writes: a worker may run it under the number that the record still has.
    number = max(record.attempt.number + 1, move.floor)
    raised = replace(record, attempt=Attempt(number, move.nonce))
    # An entry of the intake carries the attempt that it can be placed under.
    effects = (LeaveIntake(record.key), EnterIntake(record.key))
    return Transition(_decided(raised, pool, "recovered", ""), Answer(Verdict.OK, index=number), effects)


def _rebase(record: Record, move: moves.Rebase, pool: Pool) -> Transition:
    requeue = moves.Requeue(record.key, move.attempt, move.nonce, why="the reader holds another history")
    step = _requeue(record, requeue, pool)
    if step.answer.verdict != Verdict.OK or step.record is None or step.record.ended:
        return step
    return replace(step, record=replace(step.record, journal=move.journal))


def _cancel(record: Record, why: str, pool: Pool) -> Transition:
    if record.ended:
        return _unchanged(record, Verdict.ENDED)
    if record.state == RequestState.QUEUED:
        return _end_in_queue(record, RequestState.CANCELLED, why, pool)
    if record.cancel:
        return _unchanged(record, Verdict.OK)
    asked = _decided(replace(record, cancel=True), pool, "cancel_asked", why)
    return Transition(asked, Answer(Verdict.OK), (SendCancel(record.key, record.worker, record.attempt),))


def _attach(record: Record, move: moves.Attach, pool: Pool) -> Transition:
    held = move.held[: record.num_choices]
    if record.ended:
        return Transition(record, _compare_with_end(record, held))
    attached = replace(record, gateway=move.gateway, reader=record.reader + 1, reader_left_at_ms=0)
    if record.state == RequestState.QUEUED:
        # Nobody holds the current attempt, so the journal may follow the reader at once. On a worker, its front
        # compares: it knows more than the journal.
        attached = replace(attached, journal=_followed(record.journal, held))
        effects: tuple[Effect, ...] = ()
    else:
        effects = (SendRedirect(record.key, record.worker, record.attempt, move.gateway, attached.reader),)
    return Transition(
        _decided(attached, pool, "attached", move.gateway), Answer(Verdict.OK, index=attached.reader), effects
    )


def _compare_with_end(record: Record, held: Sequence[Held]) -> Answer:
    # Only a FINISHED request has its whole text in the journal; any other end is told as it is.
    differs = difference_from_end(record.journal, held) if record.state == RequestState.FINISHED else None
    return Answer(Verdict.DIVERGED, *differs) if differs else Answer(Verdict.ENDED)


def _followed(journal: tuple[tuple[int, ...], ...], held: Sequence[Held]) -> tuple[tuple[int, ...], ...]:
    followed = list(journal)
    for choice, claim in enumerate(held):
        known = journal[choice]
        if first_difference(known, claim) is not None:
            followed[choice] = rebased(known, claim)
        else:
            followed[choice] = known + beyond(known, claim)
    return tuple(followed)


def _leave(record: Record, move: moves.Leave, pool: Pool) -> Transition:
    if record.ended:
        return _unchanged(record, Verdict.ENDED)
    if record.reader != move.reader or record.reader_left_at_ms:
        return _unchanged(record, Verdict.STALE)
    left = replace(record, reader_left_at_ms=pool.now_ms)
    return Transition(_decided(left, pool, "left", str(move.reader)), Answer(Verdict.OK))


def _sweep(record: Record, move: moves.Sweep, pool: Pool) -> Transition:
    if not _leads(move.fence, pool):
        return _unchanged(record, Verdict.NOT_LEADER)
    if record.ended:
        return _unchanged(record, Verdict.ENDED)
    if record.state == RequestState.QUEUED and _expired(record, pool):
        return _end_in_queue(record, RequestState.EXPIRED, "deadline", pool)
    if record.reader_left_at_ms and record.reader_left_at_ms + record.resume_ms <= pool.now_ms:
        return _cancel(record, "nobody reads it", pool)
    return _unchanged(record, Verdict.IDLE)


NO_NOTICE: tuple[Effect, ...] = ()


def _end_in_queue(record: Record, state: RequestState, why: str, pool: Pool) -> Transition:
    ended = replace(record, state=check(record.state, state), ended_at_ms=pool.now_ms)
    effects = (LeaveIntake(record.key), Retain(record.key), *_give_back(record, pool))
    return Transition(_decided(ended, pool, state, why), Answer(Verdict.ENDED), effects)


def _end_on_worker(
    record: Record, state: RequestState, error: str, pool: Pool, notice: tuple[Effect, ...]
) -> Transition:
    ended = replace(record, state=check(record.state, state), error=error, ended_at_ms=pool.now_ms, worker=NO_WORKER)
    effects = (Release(record.key, record.worker), *notice, Retain(record.key), *_give_back(record, pool))
    return Transition(_decided(ended, pool, state, error), Answer(Verdict.OK), effects)


def _give_back(record: Record, pool: Pool) -> tuple[Effect, ...]:
    """What it did not generate of the tokens that it took, if any are still away."""
    if not record.tokens_per_minute or pool.tokens_back_at_ms <= pool.now_ms:
        return ()
    unused = max(0, record.reserved_tokens - sum(len(tokens) for tokens in record.journal))
    return (TokensBackAt(record.key, given_back(pool.tokens_back_at_ms, unused, record.tokens_per_minute)),)


def _not_this_attempt(record: Record, attempt: Attempt) -> Transition | None:
    """The refusal, unless a worker has the request under exactly this attempt."""
    if record.ended:
        return _unchanged(record, Verdict.ENDED)
    if record.attempt != attempt or record.state not in ON_WORKER:
        return _unchanged(record, Verdict.STALE)
    return None


def _journaled(record: Record, choice: int, start: int, tokens: tuple[int, ...]) -> Record:
    known = record.journal[choice]
    longer = known + tokens[len(known) - start :]
    journal = (*record.journal[:choice], longer, *record.journal[choice + 1 :])
    cleared = record.suspect_until and len(longer) >= record.suspect_until
    return replace(record, journal=journal, suspect_until=0 if cleared else record.suspect_until)


def _leads(fence: str, pool: Pool) -> bool:
    # While nobody leads, the pool's fence is empty: a move without one is no leader's.
    return bool(fence) and fence == pool.fence


def _expired(record: Record, pool: Pool) -> bool:
    return bool(record.deadline_at_ms) and record.deadline_at_ms <= pool.now_ms


def _decided(record: Record, pool: Pool, what: str, detail: str) -> Record:
    if len(record.decisions) >= MAX_DECISIONS and not record.ended:
        return record
    decision = Decision(pool.now_ms, what, record.attempt.number, detail)
    return replace(record, decisions=(*record.decisions, decision))


def _unchanged(record: Record, verdict: Verdict) -> Transition:
    return Transition(record, Answer(verdict))
