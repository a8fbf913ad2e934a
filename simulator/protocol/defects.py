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
from services.common.record.transitions import Answer, Effect, EnterIntake, Pool, Transition, Verdict
from simulator.protocol import commands as c
from simulator.protocol import leader, redis_model, worker
from simulator.protocol.engine import Engine
from simulator.protocol.gateway import Gateway
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


def _without(function: Callable[..., Transition], *effects: type[Any]) -> Callable[..., Transition]:
    """A move that forgets some of its effects."""

    def forgetful(*arguments: Any) -> Transition:
        step = function(*arguments)
        return replace(step, effects=tuple(effect for effect in step.effects if not isinstance(effect, effects)))

    return forgetful


def _attach_tells_no_worker() -> list[Patch]:
    return [(transitions, "_attach", _without(transitions._attach, transitions.SendRedirect))]


def _cancel_tells_no_worker() -> list[Patch]:
    return [(transitions, "_cancel", _without(transitions._cancel, transitions.SendCancel))]


def _end_keeps_the_reservation() -> list[Patch]:
    return [(transitions, "_end_on_worker", _without(transitions._end_on_worker, transitions.Release))]


def _attach_leaves_the_reader_away() -> list[Patch]:
    attach = transitions._attach

    def still_away(record: Record, move: moves.Attach, pool: Pool) -> Transition:
        step = attach(record, move, pool)
        if step.record is None or step.record is record:
            return step
        return replace(step, record=replace(step.record, reader_left_at_ms=record.reader_left_at_ms))

    return [(transitions, "_attach", still_away)]


def _sweep_ignores_the_resume_time() -> list[Patch]:
    sweep = transitions._sweep

    def at_once(record: Record, move: moves.Sweep, pool: Pool) -> Transition:
        step = sweep(replace(record, resume_ms=0), move, pool)
        return replace(step, record=record) if step.answer.verdict == Verdict.IDLE else step

    return [(transitions, "_sweep", at_once)]


def _submit_ignores_the_quota() -> list[Patch]:
    submit = transitions._submit

    def any_number(record: Record | None, move: moves.Submit, pool: Pool) -> Transition:
        return submit(record, replace(move, tenant_limit=0), pool)

    return [(transitions, "_submit", any_number)]


def _submit_ignores_the_tokens() -> list[Patch]:
    return [(transitions, "short_ms", lambda back_at_ms, now_ms: 0)]


def _end_gives_no_tokens_back() -> list[Patch]:
    return [(transitions, "_give_back", lambda record, pool: ())]


def _end_gives_all_tokens_back() -> list[Patch]:
    give_back = transitions._give_back

    def all_of_them(record: Record, pool: Pool) -> tuple[Effect, ...]:
        return give_back(replace(record, journal=()), pool)

    return [(transitions, "_give_back", all_of_them)]


def _any_reader_may_leave() -> list[Patch]:
    leave = transitions._leave

    def anyone(record: Record, move: moves.Leave, pool: Pool) -> Transition:
        return leave(record, replace(move, reader=max(move.reader, record.reader)), pool)

    return [(transitions, "_leave", anyone)]


def _finish_over_a_gap() -> list[Patch]:
    finish = transitions._finish

    def closes_up(record: Record, move: moves.Finish, pool: Pool) -> Transition:
        tails = tuple(
            (min(start, len(known)), tokens) for known, (start, tokens) in zip(record.journal, move.tails, strict=True)
        )
        return finish(record, replace(move, tails=tails), pool)

    return [(transitions, "_finish", closes_up)]


def _gateway_takes_tokens_over_a_gap() -> list[Patch]:
    accept = Reader.accept

    def new(self: Reader, attempt: Attempt, choice: int, index: int, num_tokens: int) -> Acceptance:
        acceptance = accept(self, attempt, choice, index, num_tokens)
        return Acceptance.NEW if acceptance is Acceptance.GAP else acceptance

    return [(Reader, "accept", new)]


def _any_progress_clears_a_suspect() -> list[Patch]:
    journaled = transitions._journaled

    def cleared(record: Record, choice: int, start: int, tokens: tuple[int, ...]) -> Record:
        return replace(journaled(record, choice, start, tokens), suspect_until=0)

    return [(transitions, "_journaled", cleared)]


def _deadline_begins_anew() -> list[Patch]:
    start_entry = RedisModel.start_entry

    def anew(self: RedisModel, record: Record) -> c.Start:
        whole_ms = record.deadline_at_ms - record.accepted_at_ms if record.deadline_at_ms else 0
        return start_entry(self, record)._replace(remaining_ms=whole_ms)

    return [(RedisModel, "start_entry", anew)]


def _leader_keeps_its_timers() -> list[Patch]:
    def kept(self: leader.Leader) -> None:
        """Nothing restarts after a stall of the leader itself."""

    return [(leader.Leader, "_restart_timers", kept)]


def _tries_share_a_nonce() -> list[Patch]:
    insist_anew, attempt = redis_model.insist_anew, Gateway._try

    def made_once(make: Callable[[], Any], pause_ms: float = 60) -> Task:
        command = make()
        return insist_anew(lambda: command, pause_ms)

    def nonce_of_the_first(self: Gateway, move: moves.Move) -> Task:
        nonce = self._nonce()
        with_it = patch.object(self, "_nonce", lambda: nonce)
        with_it.start()
        answer = yield from attempt(self, move)
        with_it.stop()
        return answer

    return [(worker, "insist_anew", made_once), (Gateway, "_try", nonce_of_the_first)]


def _redirected_to_higher_numbers_only() -> list[Patch]:
    redirect = Run.redirect

    def if_higher(self: Run, gateway: str, reader: int) -> None:
        if reader > self.reader:
            redirect(self, gateway, reader)

    return [(Run, "redirect", if_higher)]


def _any_resume_counts() -> list[Patch]:
    def any_of_them(job: Job, number: int) -> bool:
        return True

    return [(Worker, "answers_the_last_open", staticmethod(any_of_them))]


def _recovery_trusts_readers() -> list[Patch]:
    def there(record: Record, seen: list[c.HeldRequest]) -> bool:
        return True

    return [(leader, "_is_read", there)]


def _late_statements_are_not_read() -> list[Patch]:
    def nothing(self: leader.Leader) -> Task:
        yield from ()

    return [(leader.Leader, "_restore_late", nothing)]


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
        _late_statements_are_not_read,
        _rebase_keeps_the_journal,
        _suspects_never_quarantined,
        _all_requests_suspected,
        _suspects_run_in_company,
        _nobody_notes_that_readers_leave,
        _attach_tells_no_worker,
        _cancel_tells_no_worker,
        _end_keeps_the_reservation,
        _attach_leaves_the_reader_away,
        _sweep_ignores_the_resume_time,
        _submit_ignores_the_quota,
        _submit_ignores_the_tokens,
        _end_gives_no_tokens_back,
        _end_gives_all_tokens_back,
        _any_reader_may_leave,
        _finish_over_a_gap,
        _gateway_takes_tokens_over_a_gap,
        _any_progress_clears_a_suspect,
        _deadline_begins_anew,
        _leader_keeps_its_timers,
        _tries_share_a_nonce,
        _redirected_to_higher_numbers_only,
        _recovery_trusts_readers,
        _any_resume_counts,
    )
}

SHOWN_BY: dict[str, tuple[str, ...]] = {
    "any-resume-counts": ("meet",),
    "all-requests-suspected": ("kill_engine",),
    "deadline-begins-anew": ("kill_engine",),
    "fence-not-checked": ("freeze_leader",),
    "gateway-takes-any-attempt": ("zombie",),
    "gateway-takes-tokens-over-a-gap": ("overtake",),
    "journal-read-before-the-raise": ("freeze_worker", "zombie"),
    "late-statements-are-not-read": ("restart_redis_unheard",),
    "leader-keeps-its-timers": ("freeze_leader",),
    "nonce-ignored": ("lose_an_attempt",),
    "rebase-keeps-the-journal": ("zombie",),
    "recovery-keeps-attempts": ("lose_a_placement",),
    "recovery-trusts-queued-records": ("lose_a_placement",),
    "recovery-trusts-readers": ("lose_an_attach",),
    "redirected-to-higher-numbers-only": ("lose_an_attach",),
    "suspects-run-in-company": ("kill_engine",),
    "tries-share-a-nonce": ("lose_an_answer",),
}
"""Kinds of faults that show a defect soonest, where few schedules of all kinds show it."""
