"""What each move does to a request's record, and what it refuses: docs/protocol.md, rule by rule."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.ids import RequestKey, WorkerId
from services.common.record import moves
from services.common.record.history import Held
from services.common.record.record import MAX_DECISIONS, Attempt, Record
from services.common.record.states import ENDED, TRANSITIONS, IllegalTransitionError, RequestState, check
from services.common.record.transitions import (
    Answer,
    EnterIntake,
    LeaveIntake,
    Pool,
    Release,
    Retain,
    SendCancel,
    SendRedirect,
    SendStart,
    TokensBackAt,
    Verdict,
    apply,
)

KEY = RequestKey("acme/r1")
W1, W2 = WorkerId("w1"), WorkerId("w2")
LEADER, DEPOSED = "2:b", "1:a"
FIRST = Attempt(1, "n1")


def a_pool(now_ms: int = 1_000, fence: str = LEADER, intake_length: int = 0, tenant_in_flight: int = 0) -> Pool:
    return Pool(now_ms, fence, intake_length, frozenset({W1, W2}), tenant_in_flight)


POOL = a_pool()


def a_submit(digest: str = "d", deadline_ms: int = 0, num_choices: int = 1, resume_ms: int = 500) -> moves.Submit:
    return moves.Submit(KEY, digest, b"payload", num_choices, "n1", "gateway:1", resume_ms, deadline_ms, 3)


def a_place(attempt: Attempt = FIRST, worker: WorkerId = W1, fence: str = LEADER) -> moves.Place:
    return moves.Place(KEY, fence, attempt, worker)


def an_append(*tokens: int, start: int = 0, attempt: Attempt = FIRST) -> moves.Append:
    return moves.Append(KEY, attempt, 0, start, tokens)


def a_finish(
    *tokens: int, start: int = 0, attempt: Attempt = FIRST, state: RequestState = RequestState.FINISHED
) -> moves.Finish:
    return moves.Finish(KEY, attempt, state, ((start, tokens),), b"outcome")


def a_requeue(
    attempt: Attempt = FIRST, nonce: str = "n2", fence: str = "", floor: int = 0, suspect_until: int = 0
) -> moves.Requeue:
    return moves.Requeue(KEY, attempt, nonce, "its worker was lost", fence, floor, suspect_until)


def after(*history: moves.Move, pool: Pool = POOL, record: Record | None = None) -> Record:
    """The record once all of these were made."""
    for move in history:
        record = apply(record, move, pool).record
    assert record is not None
    return record


def queued(**submit: int) -> Record:
    return after(a_submit(**submit))  # type: ignore[arg-type]


def placed(**submit: int) -> Record:
    return after(a_place(), record=queued(**submit))


def running(*tokens: int) -> Record:
    return after(an_append(*tokens), record=placed())


def refused(record: Record | None, move: moves.Move, pool: Pool = POOL) -> Verdict:
    """The verdict of a move that changes nothing."""
    step = apply(record, move, pool)
    assert (step.record, step.effects) == (record, ())
    return step.answer.verdict


# --- states ---------------------------------------------------------------------------------------------------------


def test_what_has_ended_never_moves_again() -> None:
    assert {state for state, following in TRANSITIONS.items() if not following} == ENDED


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(RequestState)


def test_a_move_that_the_table_does_not_have_is_a_defect() -> None:
    with pytest.raises(IllegalTransitionError, match="queued -> running"):
        check(RequestState.QUEUED, RequestState.RUNNING)


# --- submit ---------------------------------------------------------------------------------------------------------


def test_an_accepted_request_waits_in_the_intake_under_its_first_attempt() -> None:
    step = apply(None, a_submit(deadline_ms=50), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.attempt, step.record.reader) == (RequestState.QUEUED, FIRST, 1)
    assert step.record.deadline_at_ms == 1_050
    assert (step.answer.verdict, step.effects) == (Verdict.OK, (EnterIntake(KEY),))


def test_the_same_request_sent_twice_is_one_request() -> None:
    assert refused(running(7), a_submit()) == Verdict.KNOWN


def test_an_id_with_another_payload_is_a_conflict() -> None:
    assert refused(queued(), a_submit(digest="other")) == Verdict.CONFLICT


def test_a_full_backlog_refuses_and_says_how_long_it_is() -> None:
    step = apply(None, a_submit(), a_pool(intake_length=3))
    assert (step.record, step.answer.verdict, step.answer.index) == (None, Verdict.FULL, 3)


def test_a_tenant_at_its_limit_is_refused_and_told_how_many_it_has() -> None:
    limited = replace(a_submit(), tenant_limit=2)
    assert apply(None, limited, a_pool(tenant_in_flight=1)).answer.verdict == Verdict.OK
    step = apply(None, limited, a_pool(tenant_in_flight=2, intake_length=3))
    assert (step.record, step.answer.verdict, step.answer.index) == (None, Verdict.QUOTA, 2)
    assert refused(queued(), limited, a_pool(tenant_in_flight=2)) == Verdict.KNOWN
    assert apply(None, a_submit(), a_pool(tenant_in_flight=1_000)).answer.verdict == Verdict.OK


METERED = replace(a_submit(), tokens_per_minute=600, prompt_tokens=100, reserved_tokens=200)
"""Of a tenant whose tokens come back within 100 ms each."""


def a_minute(tokens_back_at_ms: int, **fields: int) -> Pool:
    return replace(a_pool(**fields), tokens_back_at_ms=tokens_back_at_ms)  # type: ignore[arg-type]


def test_a_request_takes_its_tenants_tokens_and_is_refused_while_there_are_not_enough() -> None:
    assert apply(None, METERED, a_pool()).effects[-1] == TokensBackAt(KEY, 31_000)
    assert apply(None, METERED, a_minute(31_000)).effects[-1] == TokensBackAt(KEY, 61_000)
    step = apply(None, METERED, a_minute(31_001, intake_length=3))
    assert (step.record, step.answer) == (None, Answer(Verdict.TOKENS, index=1)), "in 1 ms there are"
    assert refused(queued(), METERED, a_minute(1_000_000)) == Verdict.KNOWN
    assert apply(None, a_submit(), a_minute(1_000_000)).effects == (EnterIntake(KEY),), "nobody counts these"


def test_tokens_that_an_answer_did_not_need_come_back_at_its_end() -> None:
    running = after(METERED, a_place(), an_append(1, 2))
    assert apply(running, a_requeue(), a_minute(31_000)).effects[-1] == EnterIntake(KEY), "it goes on"
    all_but_three = TokensBackAt(KEY, 31_000 - 197 * 100)
    assert apply(running, a_finish(3, start=2), a_minute(31_000)).effects[-1] == all_but_three
    cancelled = apply(after(METERED), moves.Cancel(KEY, "why"), a_minute(31_000))
    assert cancelled.effects[-1] == TokensBackAt(KEY, 31_000 - 200 * 100)
    assert apply(running, a_finish(3, start=2), a_minute(900)).effects[-1] == Retain(KEY), "all are back already"


def test_a_known_request_is_known_even_where_the_backlog_is_full() -> None:
    assert refused(queued(), a_submit(), a_pool(intake_length=3)) == Verdict.KNOWN


def test_whoever_asks_about_an_unknown_request_is_told_so() -> None:
    for move in (a_place(), an_append(1), a_finish(), a_requeue(), moves.Cancel(KEY, ""), moves.Leave(KEY, 1)):
        assert refused(None, move) == Verdict.UNKNOWN


# --- place ----------------------------------------------------------------------------------------------------------


def test_a_placed_request_leaves_the_intake_for_its_workers_inbox() -> None:
    step = apply(queued(), a_place(), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.worker, step.record.placed_at_ms) == (RequestState.PLACED, W1, 1_000)
    assert step.effects == (LeaveIntake(KEY), SendStart(KEY, W1))


@pytest.mark.parametrize("fence", [DEPOSED, ""])
def test_only_the_leader_places(fence: str) -> None:
    assert refused(queued(), a_place(fence=fence)) == Verdict.NOT_LEADER


def test_while_nobody_leads_a_move_without_a_fence_is_no_leaders() -> None:
    nobody = a_pool(fence="")
    assert refused(queued(), a_place(fence=""), nobody) == Verdict.NOT_LEADER
    assert refused(queued(), moves.Sweep(KEY, ""), nobody) == Verdict.NOT_LEADER
    assert refused(queued(), moves.Recover(KEY, "", "n", 9), nobody) == Verdict.NOT_LEADER


def test_nothing_is_placed_on_a_worker_that_is_not_registered() -> None:
    assert refused(queued(), a_place(worker=WorkerId("gone"))) == Verdict.NO_WORKER


@pytest.mark.parametrize("attempt", [Attempt(2, "n1"), Attempt(1, "another")])
def test_only_the_current_attempt_is_placed(attempt: Attempt) -> None:
    assert refused(queued(), a_place(attempt)) == Verdict.STALE


def test_a_request_is_placed_once() -> None:
    assert refused(placed(), a_place(worker=W2)) == Verdict.STALE


def test_an_expired_request_ends_in_the_queue_instead_of_being_placed() -> None:
    step = apply(queued(deadline_ms=50), a_place(), a_pool(now_ms=1_050))
    assert step.record is not None
    assert (step.record.state, step.answer.verdict) == (RequestState.EXPIRED, Verdict.ENDED)
    assert step.effects == (LeaveIntake(KEY), Retain(KEY))


# --- append and finish ----------------------------------------------------------------------------------------------


def test_the_first_append_says_that_it_runs() -> None:
    assert after(an_append(), record=placed()).state == RequestState.RUNNING


def test_an_append_made_twice_or_overlapping_counts_once() -> None:
    record = after(an_append(1, 2), an_append(1, 2), an_append(2, 3, start=1), record=placed())
    assert record.journal == ((1, 2, 3),)


def test_an_append_beyond_the_journal_is_a_gap_that_says_where_to_go_on() -> None:
    step = apply(running(1, 2), an_append(9, start=3), POOL)
    assert (step.answer.verdict, step.answer.index, step.record) == (Verdict.GAP, 2, running(1, 2))


def test_the_outcome_brings_the_last_tokens_and_frees_the_reservation() -> None:
    step = apply(running(1, 2), a_finish(3, start=2), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.journal) == (RequestState.FINISHED, ((1, 2, 3),))
    assert (step.record.outcome, step.record.worker) == (b"outcome", "")
    assert step.effects == (Release(KEY, W1), Retain(KEY))


def test_a_finish_beyond_the_journal_is_a_gap_and_ends_nothing() -> None:
    assert refused(running(1), a_finish(3, start=2)) == Verdict.GAP


def test_a_request_ends_once() -> None:
    finished = after(a_finish(), record=running(1))
    every_move: Sequence[moves.Move] = (
        a_place(), an_append(1), a_finish(), a_requeue(), moves.Rebase(KEY, FIRST, "n", ((),)), moves.Cancel(KEY, ""),
        moves.Leave(KEY, 1), moves.Sweep(KEY, LEADER), moves.Recover(KEY, LEADER, "n", 9),
        moves.Attach(KEY, "gateway:2", ()),
    )  # fmt: skip
    for move in every_move:
        assert refused(finished, move) == Verdict.ENDED


@pytest.mark.parametrize("attempt", [Attempt(1, "n1"), Attempt(2, "another"), Attempt(3, "n2")])
def test_only_the_attempt_that_runs_may_write(attempt: Attempt) -> None:
    second = after(a_requeue(), a_place(Attempt(2, "n2")), record=running(1))
    for move in (
        an_append(5, start=1, attempt=attempt),
        a_finish(attempt=attempt),
        a_requeue(attempt),
        moves.Rebase(KEY, attempt, "n", ((9,),)),
    ):
        assert refused(second, move) == Verdict.STALE


def test_nobody_writes_to_a_request_that_waits_in_the_queue() -> None:
    waiting = after(a_requeue(), record=running(1))
    assert refused(waiting, an_append(5, start=1, attempt=Attempt(2, "n2"))) == Verdict.STALE


# --- requeue and rebase ---------------------------------------------------------------------------------------------


def test_a_requeued_request_waits_under_a_higher_attempt_with_its_tokens() -> None:
    step = apply(running(1, 2), a_requeue(), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.attempt) == (RequestState.QUEUED, Attempt(2, "n2"))
    assert (step.record.journal, step.record.worker, step.answer.index) == (((1, 2),), "", 2)
    assert step.effects == (Release(KEY, W1), EnterIntake(KEY))


def test_the_next_attempt_is_above_every_one_that_somebody_has_seen() -> None:
    assert after(a_requeue(floor=7), record=running()).attempt.number == 7
    assert after(a_requeue(floor=1), record=running()).attempt.number == 2


def test_a_worker_that_the_leader_takes_a_request_from_is_told_to_drop_it() -> None:
    step = apply(running(), a_requeue(fence=LEADER), POOL)
    assert step.effects == (Release(KEY, W1), SendCancel(KEY, W1, FIRST), EnterIntake(KEY))


def test_a_deposed_leader_takes_nothing() -> None:
    assert refused(running(), a_requeue(fence=DEPOSED)) == Verdict.NOT_LEADER


def test_a_cancelled_request_ends_instead_of_being_requeued() -> None:
    record = after(moves.Cancel(KEY, "enough"), a_requeue(), record=running(1))
    assert record.state == RequestState.CANCELLED


def test_an_expired_request_ends_instead_of_being_requeued() -> None:
    assert after(a_requeue(), record=placed(deadline_ms=50), pool=a_pool(now_ms=1_050)).state == RequestState.EXPIRED


def test_a_rebased_request_goes_on_from_its_readers_own_history() -> None:
    record = after(moves.Rebase(KEY, FIRST, "n2", ((1, 9),)), record=running(1, 2, 3))
    assert (record.state, record.attempt, record.journal) == (RequestState.QUEUED, Attempt(2, "n2"), ((1, 9),))


# --- suspects -------------------------------------------------------------------------------------------------------


def test_a_suspect_whose_engine_dies_again_is_quarantined() -> None:
    suspect = after(a_requeue(suspect_until=3), a_place(Attempt(2, "n2")), record=running(1))
    ended = after(a_requeue(Attempt(2, "n2"), "n3", suspect_until=3), record=suspect)
    assert (ended.state, "died twice" in ended.error) == (RequestState.QUARANTINED, True)


def test_progress_beyond_the_point_of_death_clears_a_suspect() -> None:
    second = Attempt(2, "n2")
    suspect = after(a_requeue(suspect_until=3), a_place(second), record=running(1))
    assert after(an_append(2, start=1, attempt=second), record=suspect).suspect_until == 3
    cleared = after(an_append(2, 3, start=1, attempt=second), record=suspect)
    assert cleared.suspect_until == 0
    assert after(a_requeue(second, "n3", suspect_until=5), record=cleared).state == RequestState.QUEUED


def test_a_suspect_that_is_handed_over_for_another_reason_stays_a_suspect() -> None:
    suspect = after(a_requeue(suspect_until=3), a_place(Attempt(2, "n2")), record=running(1))
    again = after(a_requeue(Attempt(2, "n2"), "n3"), record=suspect)
    assert (again.state, again.suspect_until) == (RequestState.QUEUED, 3)


# --- cancel ---------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_ends_in_the_queue_at_once() -> None:
    step = apply(queued(), moves.Cancel(KEY, "enough"), POOL)
    assert step.record is not None
    assert (step.record.state, step.effects) == (RequestState.CANCELLED, (LeaveIntake(KEY), Retain(KEY)))


def test_a_cancel_on_a_worker_is_told_to_it_once_and_with_every_append() -> None:
    step = apply(running(1), moves.Cancel(KEY, "enough"), POOL)
    assert step.effects == (SendCancel(KEY, W1, FIRST),)
    assert step.record is not None
    assert refused(step.record, moves.Cancel(KEY, "again")) == Verdict.OK
    assert apply(step.record, an_append(2, start=1), POOL).answer.verdict == Verdict.CANCEL


# --- readers --------------------------------------------------------------------------------------------------------


def test_the_last_reader_wins() -> None:
    first = apply(queued(), moves.Attach(KEY, "gateway:2", ()), POOL)
    assert first.record is not None
    second = apply(first.record, moves.Attach(KEY, "gateway:3", ()), POOL)
    assert second.record is not None
    assert (second.answer.index, second.record.reader, second.record.gateway) == (3, 3, "gateway:3")


def test_in_the_queue_the_journal_follows_the_reader() -> None:
    waiting = after(a_requeue(), record=running(1, 2, 3))
    for held, journal in (
        (Held(5, (4, 5)), (1, 2, 3, 4, 5)),
        (Held(3, (2, 9)), (1, 2, 9)),
        (Held(2, (1, 2)), (1, 2, 3)),
        (Held(9, (9,)), (1, 2, 3)),
    ):
        assert after(moves.Attach(KEY, "gateway:2", (held,)), record=waiting).journal == (journal,)


def test_on_a_worker_the_reader_is_redirected_and_the_journal_stays() -> None:
    step = apply(running(1, 2), moves.Attach(KEY, "gateway:2", (Held(3, (1, 2, 3)),)), POOL)
    assert step.record is not None
    assert step.record.journal == ((1, 2),)
    assert step.effects == (SendRedirect(KEY, W1, FIRST, "gateway:2", 2),)


def test_a_reader_that_holds_another_end_is_told_where_it_differs() -> None:
    finished = after(a_finish(3, start=2), record=running(1, 2))
    answer = apply(finished, moves.Attach(KEY, "gateway:2", (Held(3, (2, 9)),)), POOL).answer
    assert (answer.verdict, answer.index) == (Verdict.DIVERGED, 2)
    answer = apply(finished, moves.Attach(KEY, "gateway:2", (Held(5, (4, 5)),)), POOL).answer
    assert (answer.verdict, answer.index) == (Verdict.DIVERGED, 3)


def test_only_a_finished_request_can_differ_from_what_its_reader_holds() -> None:
    cancelled = after(a_finish(state=RequestState.CANCELLED), record=running(1))
    assert refused(cancelled, moves.Attach(KEY, "gateway:2", (Held(2, (9, 9)),))) == Verdict.ENDED


def test_a_request_that_nobody_reads_is_cancelled_when_its_resume_time_is_over() -> None:
    left = after(moves.Leave(KEY, 1), record=queued(resume_ms=500))
    assert refused(left, moves.Sweep(KEY, LEADER), a_pool(now_ms=1_499)) == Verdict.IDLE
    assert after(moves.Sweep(KEY, LEADER), record=left, pool=a_pool(now_ms=1_500)).state == RequestState.CANCELLED


def test_a_reader_that_comes_back_saves_its_request() -> None:
    back = after(moves.Leave(KEY, 1), moves.Attach(KEY, "gateway:1", ()), record=queued())
    assert refused(back, moves.Sweep(KEY, LEADER), a_pool(now_ms=99_999)) == Verdict.IDLE


def test_a_superseded_reader_may_leave_unheard() -> None:
    assert refused(after(moves.Attach(KEY, "gateway:2", ()), record=queued()), moves.Leave(KEY, 1)) == Verdict.STALE


def test_a_reader_leaves_once() -> None:
    left = after(moves.Leave(KEY, 1), record=queued())
    assert refused(left, moves.Leave(KEY, 1), a_pool(now_ms=2_000)) == Verdict.STALE


def test_what_expired_in_the_queue_is_swept() -> None:
    waiting = queued(deadline_ms=50)
    assert refused(waiting, moves.Sweep(KEY, LEADER), a_pool(now_ms=1_049)) == Verdict.IDLE
    assert after(moves.Sweep(KEY, LEADER), record=waiting, pool=a_pool(now_ms=1_050)).state == RequestState.EXPIRED


def test_only_the_leader_sweeps() -> None:
    assert refused(queued(deadline_ms=1), moves.Sweep(KEY, DEPOSED), a_pool(now_ms=9_999)) == Verdict.NOT_LEADER


# --- recovery -------------------------------------------------------------------------------------------------------


def a_restore(fence: str = LEADER) -> moves.Restore:
    return moves.Restore(KEY, fence, "d", b"payload", 1, "n5", "gateway:1", 4, 500, 900, 0, ((1, 2),), floor=5)


def test_a_request_that_redis_lost_is_put_back_above_all_that_was_seen_of_it() -> None:
    step = apply(None, a_restore(), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.attempt) == (RequestState.QUEUED, Attempt(5, "n5"))
    assert (step.record.journal, step.record.reader, step.record.accepted_at_ms) == (((1, 2),), 4, 900)
    assert step.effects == (EnterIntake(KEY),)


def test_what_redis_still_has_is_not_restored() -> None:
    assert refused(running(1), a_restore()) == Verdict.KNOWN


def test_only_the_leader_recovers() -> None:
    assert refused(None, a_restore(fence=DEPOSED)) == Verdict.NOT_LEADER
    assert refused(running(), moves.Recover(KEY, DEPOSED, "n", 9)) == Verdict.NOT_LEADER


def test_recovery_takes_a_request_from_its_worker() -> None:
    step = apply(running(1), moves.Recover(KEY, LEADER, "n9", 9), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.attempt) == (RequestState.QUEUED, Attempt(9, "n9"))
    assert SendCancel(KEY, W1, FIRST) in step.effects


def test_recovery_raises_what_waits_and_renews_its_entry_in_the_intake() -> None:
    step = apply(queued(), moves.Recover(KEY, LEADER, "n2", 0), POOL)
    assert step.record is not None
    assert (step.record.state, step.record.attempt) == (RequestState.QUEUED, Attempt(2, "n2"))
    assert step.effects == (LeaveIntake(KEY), EnterIntake(KEY))


# --- the decision record --------------------------------------------------------------------------------------------


def test_every_decision_is_told_in_order() -> None:
    record = after(a_requeue(), record=running(1))
    assert [decision.what for decision in record.decisions] == ["accepted", "placed", "running", "requeued"]


def test_decisions_are_capped_but_the_end_is_always_told() -> None:
    record = queued()
    for _ in range(MAX_DECISIONS + 5):
        record = after(moves.Attach(KEY, "gateway:2", ()), record=record)
    assert len(record.decisions) == MAX_DECISIONS
    assert after(moves.Cancel(KEY, "enough"), record=record).decisions[-1].what == "cancelled"


# --- random histories -----------------------------------------------------------------------------------------------

fences = st.sampled_from([LEADER, LEADER, LEADER, DEPOSED, ""])
nonces = st.sampled_from(["n1", "n2", "n3"])
attempts = st.builds(Attempt, st.integers(1, 4), nonces)
tokens = st.lists(st.integers(0, 3), max_size=4).map(tuple)
small = st.integers(0, 4)
any_held = st.lists(tokens.flatmap(lambda t: st.builds(Held, st.integers(len(t), len(t) + 2), st.just(t))), max_size=2)
any_move: st.SearchStrategy[moves.Move] = st.one_of(
    st.builds(a_submit, deadline_ms=small, resume_ms=small),
    st.builds(moves.Place, st.just(KEY), fences, attempts, st.sampled_from([W1, W2, WorkerId("gone")])),
    st.builds(moves.Append, st.just(KEY), attempts, st.just(0), small, tokens),
    st.builds(
        a_finish, start=small, attempt=attempts, state=st.sampled_from(sorted(ENDED - {RequestState.QUARANTINED}))
    ),
    st.builds(a_requeue, attempts, nonces, fences, small, small),
    st.builds(moves.Rebase, st.just(KEY), attempts, nonces, st.tuples(tokens)),
    st.builds(moves.Cancel, st.just(KEY), st.just("why")),
    st.builds(moves.Attach, st.just(KEY), st.just("gateway:2"), any_held.map(tuple)),
    st.builds(moves.Leave, st.just(KEY), small),
    st.builds(moves.Sweep, st.just(KEY), fences),
    st.builds(a_restore, fences),
    st.builds(moves.Recover, st.just(KEY), fences, nonces, small),
)


@given(history=st.lists(st.tuples(any_move, st.booleans(), st.integers(0, 3)), max_size=40))
def test_no_history_leaves_an_end_or_makes_a_move_that_the_table_does_not_have(
    history: list[tuple[moves.Move, bool, int]],
) -> None:
    record, now_ms = None, 1_000
    for drawn, by_the_one_that_counts, wait_ms in history:
        now_ms += wait_ms
        move = _by_the_current_attempt(drawn, record) if by_the_one_that_counts else drawn
        step = apply(record, move, a_pool(now_ms))
        if record is not None:
            assert step.record is not None
            assert step.record.attempt.number >= record.attempt.number
            assert step.record == record or not record.ended
            if step.record.state != record.state:
                assert step.record.state in TRANSITIONS[record.state]
        record = step.record


def _by_the_current_attempt(move: moves.Move, record: Record | None) -> moves.Move:
    if record is None or not hasattr(move, "attempt"):
        return move
    return replace(move, attempt=record.attempt)  # type: ignore[arg-type]
