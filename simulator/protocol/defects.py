"""Planted breakages of the protocol, each a line or two. The checks must find every one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from services.common.record import moves, run, transitions
from services.common.record.history import Held
from services.common.record.reader import Acceptance, Reader, Refused
from services.common.record.record import Attempt, Record
from services.common.record.run import Diverged, MaySample, Run
from services.common.record.states import ON_WORKER, RequestState
from services.common.record.transitions import Answer, EnterIntake, Pool, Transition, Verdict
from simulator.protocol import commands as c
from simulator.protocol import leader
from simulator.protocol.engine import Engine
from simulator.protocol.redis_model import RedisModel
from simulator.protocol.worker import Job, Worker
from simulator.protocol.world import Task

Patch = tuple[Any, str, Any]
"""Where, what, and by what it is replaced."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Break the protocol inside of a `with`. Raises KeyError for an unknown name."""
    with ExitStack() as patches:
        for where, what, by in DEFECTS[name]():
            patches.enter_context(patch.object(where, what, by))
        yield


def _journal_read_before_the_raise() -> list[Patch]:
    arrives, start_entry = RedisModel._arrives, RedisModel.start_entry
    read: WeakKeyDictionary[RedisModel, dict[str, tuple[int, Any]]] = WeakKeyDictionary()

    def read_then_requeue(self: RedisModel, number: int, command: Any) -> None:
        record = self.data.records.get(command.key) if isinstance(command, moves.Requeue) else None
        if record is None or record.attempt != command.attempt:
            arrives(self, number, command)
        else:
            read.setdefault(self, {})[record.key] = (record.attempt.number + 1, record.journal)
            self.world.after(300, self, lambda: arrives(self, number, command))

    def start_from_what_was_read(self: RedisModel, record: Record) -> c.Start:
        number, journal = read.get(self, {}).get(record.key, (0, ()))
        start = start_entry(self, record)
        return start._replace(journal=journal) if number == record.attempt.number else start

    return [(RedisModel, "_arrives", read_then_requeue), (RedisModel, "start_entry", start_from_what_was_read)]


def _nonce_ignored() -> list[Patch]:
    not_this_attempt, reader_open, accept = transitions._not_this_attempt, Reader.open, Reader.accept

    def by_number(record: Record, attempt: Attempt) -> Transition | None:
        same = attempt.number == record.attempt.number
        return not_this_attempt(record, record.attempt if same else attempt)

    def open_by_number(self: Reader, attempt: Attempt, reader: int) -> Refused | None:
        if self.opened and self.opened.number == attempt.number:
            self.opened = attempt
        return reader_open(self, attempt, reader)

    def accept_by_number(self: Reader, attempt: Attempt, choice: int, index: int, num_tokens: int) -> Acceptance:
        same = self.opened is not None and self.opened.number == attempt.number
        return accept(self, self.opened if same and self.opened else attempt, choice, index, num_tokens)

    return [
        (transitions, "_not_this_attempt", by_number),
        (Reader, "open", open_by_number),
        (Reader, "accept", accept_by_number),
    ]


def _samples_before_the_gateway_answered() -> list[Patch]:
    begin = Run.__init__

    def sampling(self: Run, *arguments: Any) -> None:
        begin(self, *arguments)
        self.sampling = True

    return [(Run, "__init__", sampling)]


def _forces_nothing() -> list[Patch]:
    def nothing(known: Sequence[int], held: Held) -> tuple[int, ...]:
        return ()

    return [(run, "beyond", nothing)]


def _ignores_another_history() -> list[Patch]:
    resume = Run.resume

    def goes_on(self: Run, held: Sequence[Held]) -> MaySample | Diverged | None:
        result = resume(self, held)
        if isinstance(result, Diverged):
            self._sent = [claim.count for claim in held]
            self.open = True
            return self._begin(((),) * len(self.known))
        return result

    return [(Run, "resume", goes_on)]


def _gateway_takes_any_attempt() -> list[Patch]:
    accept = Reader.accept

    def open_any(self: Reader, attempt: Attempt, reader: int) -> Refused | None:
        self.opened = attempt
        return None

    def accept_any(self: Reader, attempt: Attempt, choice: int, index: int, num_tokens: int) -> Acceptance:
        return accept(self, self.opened or attempt, choice, index, num_tokens)

    return [(Reader, "open", open_any), (Reader, "accept", accept_any)]


def _gateway_counts_instead_of_comparing() -> list[Patch]:
    delivered = Reader.delivered

    def counted(self: Reader) -> tuple[Held, ...]:
        return tuple(Held(claim.count) for claim in delivered(self))

    return [(Reader, "delivered", counted)]


def _finish_not_fenced() -> list[Patch]:
    finish = transitions._finish

    def by_anybody(record: Record, move: moves.Finish, pool: Pool) -> Transition:
        if record.state in ON_WORKER:
            move = replace(move, attempt=record.attempt)
        return finish(record, move, pool)

    return [(transitions, "_finish", by_anybody)]


def _append_not_fenced() -> list[Patch]:
    append = transitions._append

    def by_anybody(record: Record, move: moves.Append, pool: Pool) -> Transition:
        if record.state in ON_WORKER:
            move = replace(move, attempt=record.attempt)
        return append(record, move, pool)

    return [(transitions, "_append", by_anybody)]


def _append_not_idempotent() -> list[Patch]:
    def appended(record: Record, choice: int, start: int, tokens: tuple[int, ...]) -> Record:
        longer = record.journal[choice] + tokens
        return replace(record, journal=(*record.journal[:choice], longer, *record.journal[choice + 1 :]))

    return [(transitions, "_journaled", appended)]


def _append_over_a_gap() -> list[Patch]:
    append = transitions._append

    def closes_up(record: Record, move: moves.Append, pool: Pool) -> Transition:
        return append(record, replace(move, start=min(move.start, len(record.journal[move.choice]))), pool)

    return [(transitions, "_append", closes_up)]


def _end_told_before_its_outcome() -> list[Patch]:
    finish = Worker._finish

    def tell_first(self: Worker, job: Job, state: RequestState) -> Task:
        if not job.ending:
            self._tell_end(job, state)
        yield from finish(self, job, state)

    return [(Worker, "_finish", tell_first)]


def _place_ignores_the_deadline() -> list[Patch]:
    place = transitions._place

    def in_place(record: Record, move: moves.Place, pool: Pool) -> Transition:
        with patch.object(transitions, "_expired", lambda record, pool: False):
            return place(record, move, pool)

    return [(transitions, "_place", in_place)]


def _requeue_ignores_cancel() -> list[Patch]:
    requeue = transitions._requeue

    def uncancelled(record: Record, move: moves.Requeue, pool: Pool) -> Transition:
        return requeue(replace(record, cancel=False) if record.cancel else record, move, pool)

    return [(transitions, "_requeue", uncancelled)]


def _fence_not_checked() -> list[Patch]:
    apply = transitions.apply

    def for_any_leader(record: Record | None, move: moves.Move, pool: Pool) -> Transition:
        return apply(record, move, replace(pool, fence=getattr(move, "fence", "")))

    return [(transitions, "apply", for_any_leader)]


def _requeue_forgets_the_intake() -> list[Patch]:
    requeue = transitions._requeue

    def forgets(record: Record, move: moves.Requeue, pool: Pool) -> Transition:
        step = requeue(record, move, pool)
        return replace(step, effects=tuple(e for e in step.effects if not isinstance(e, EnterIntake)))

    return [(transitions, "_requeue", forgets)]


def _attach_keeps_the_reader_number() -> list[Patch]:
    attach = transitions._attach

    def same_number(record: Record, move: moves.Attach, pool: Pool) -> Transition:
        return attach(record if record.ended else replace(record, reader=record.reader - 1), move, pool)

    return [(transitions, "_attach", same_number)]


def _recovery_keeps_attempts() -> list[Patch]:
    recover = transitions._recover

    def kept(record: Record, move: moves.Recover, pool: Pool) -> Transition:
        if record.state == RequestState.QUEUED:
            return Transition(record, Answer(Verdict.OK))
        return recover(record, move, pool)

    return [(transitions, "_recover", kept)]


def _recovery_trusts_queued_records() -> list[Patch]:
    def by_attempt_alone(record: Record, seen: list[c.HeldRequest]) -> bool:
        return any(held.key == record.key and held.runs_here and held.attempt == record.attempt for held in seen)

    return [(leader, "_runs_as_recorded", by_attempt_alone)]


def _recovery_forgets_the_intake_entry() -> list[Patch]:
    recover = transitions._recover

    def old_entry(record: Record, move: moves.Recover, pool: Pool) -> Transition:
        step = recover(record, move, pool)
        return replace(step, effects=()) if record.state == RequestState.QUEUED else step

    return [(transitions, "_recover", old_entry)]


def _restores_nothing() -> list[Patch]:
    def nothing(record: Record | None, move: moves.Restore, pool: Pool) -> Transition:
        return Transition(record, Answer(Verdict.KNOWN))

    return [(transitions, "_restore", nothing)]


def _rebase_keeps_the_journal() -> list[Patch]:
    rebase = transitions._rebase

    def kept(record: Record, move: moves.Rebase, pool: Pool) -> Transition:
        step = rebase(record, move, pool)
        return step if step.record is None else replace(step, record=replace(step.record, journal=record.journal))

    return [(transitions, "_rebase", kept)]


def _suspects_never_quarantined() -> list[Patch]:
    requeue = transitions._requeue

    def again(record: Record, move: moves.Requeue, pool: Pool) -> Transition:
        return requeue(replace(record, suspect_until=0), move, pool)

    return [(transitions, "_requeue", again)]


def _all_requests_suspected() -> list[Patch]:
    died = Worker.engine_died

    def all_of_them(self: Worker, in_flight: Sequence[Job]) -> None:
        died(self, list(self.jobs.values()))

    return [(Worker, "engine_died", all_of_them)]


def _suspects_run_in_company() -> list[Patch]:
    begin = Engine._begin

    def together(self: Engine) -> None:
        for job in self.worker.jobs.values():
            job.suspect_until = 0
        begin(self)

    return [(Engine, "_begin", together)]


def _nobody_notes_that_readers_leave() -> list[Patch]:
    def stays(record: Record, move: moves.Leave, pool: Pool) -> Transition:
        return Transition(record, Answer(Verdict.STALE))

    return [(transitions, "_leave", stays)]


DEFECTS: dict[str, Callable[[], list[Patch]]] = {
    make.__name__.strip("_").replace("_", "-"): make
    for make in (
        _journal_read_before_the_raise,
        _nonce_ignored,
        _samples_before_the_gateway_answered,
        _forces_nothing,
        _ignores_another_history,
        _gateway_takes_any_attempt,
        _gateway_counts_instead_of_comparing,
        _finish_not_fenced,
        _append_not_fenced,
        _append_not_idempotent,
        _append_over_a_gap,
        _end_told_before_its_outcome,
        _place_ignores_the_deadline,
        _requeue_ignores_cancel,
        _fence_not_checked,
        _requeue_forgets_the_intake,
        _attach_keeps_the_reader_number,
        _recovery_keeps_attempts,
        _recovery_trusts_queued_records,
        _recovery_forgets_the_intake_entry,
        _restores_nothing,
        _rebase_keeps_the_journal,
        _suspects_never_quarantined,
        _all_requests_suspected,
        _suspects_run_in_company,
        _nobody_notes_that_readers_leave,
    )
}
