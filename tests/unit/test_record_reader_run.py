"""Whose tokens count: the reader in a gateway, the run in a worker, and the histories that they compare."""

from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.common.ids import RequestKey
from services.common.record.history import Held, beyond, first_difference, rebased
from services.common.record.reader import Acceptance, Reader, Refused
from services.common.record.record import Attempt
from services.common.record.run import Diverged, Frame, MaySample, Run

KEY = RequestKey("acme/r1")
FIRST, SECOND, TWIN = Attempt(1, "n1"), Attempt(2, "n2"), Attempt(2, "another")


def a_run(attempt: Attempt = FIRST, *journals: Sequence[int]) -> Run:
    return Run(KEY, attempt, "gateway:1", 1, journals or ((),))


def held(*tokens: int) -> tuple[Held, ...]:
    """All that a client holds of choice 0."""
    return (Held(len(tokens), tokens),)


def an_open_reader(attempt: Attempt = FIRST, *tokens: int) -> Reader:
    reader = Reader(1, 1, held(*tokens))
    assert reader.open(attempt, 1) is None
    return reader


# --- the reader -----------------------------------------------------------------------------------------------------


def test_a_reader_takes_tokens_in_order_and_each_once() -> None:
    reader = an_open_reader()
    assert reader.accept(FIRST, 0, 0, 2) == Acceptance.NEW
    reader.deliver(0, (1, 2))
    assert reader.accept(FIRST, 0, 0, 2) == Acceptance.OLD
    assert reader.accept(FIRST, 0, 2, 1) == Acceptance.NEW
    assert reader.delivered() == held(1, 2)


@pytest.mark.parametrize(("index", "num_tokens"), [(3, 1), (1, 2)])
def test_tokens_that_do_not_follow_directly_are_a_gap(index: int, num_tokens: int) -> None:
    assert an_open_reader(FIRST, 1, 2).accept(FIRST, 0, index, num_tokens) == Acceptance.GAP


def test_nothing_is_taken_before_an_attempt_is_opened() -> None:
    assert Reader(1, 1).accept(FIRST, 0, 0, 1) == Acceptance.REFUSED


@pytest.mark.parametrize("other", [FIRST, TWIN])
def test_tokens_and_ends_are_taken_only_from_the_attempt_opened_last(other: Attempt) -> None:
    reader = an_open_reader(SECOND)
    assert reader.accept(other, 0, 0, 1) == Acceptance.REFUSED
    assert not reader.may_end(other)
    assert reader.may_end(SECOND)


@pytest.mark.parametrize("stale", [FIRST, TWIN])
def test_an_older_attempt_or_one_with_another_nonce_is_not_opened(stale: Attempt) -> None:
    reader = an_open_reader(SECOND)
    assert reader.open(stale, 1) == Refused.STALE_ATTEMPT
    assert reader.opened == SECOND


def test_an_attempt_may_be_opened_again() -> None:
    assert an_open_reader(SECOND).open(SECOND, 1) is None


def test_an_attempt_that_looks_for_another_reader_is_refused() -> None:
    assert Reader(2, 1).open(FIRST, 1) == Refused.NO_READER


def test_what_the_client_brought_counts_as_delivered() -> None:
    reader = Reader(1, 2, held(1, 2))
    assert reader.delivered() == (Held(2, (1, 2)), Held(0))


# --- the run --------------------------------------------------------------------------------------------------------


def test_the_first_attempt_samples_at_once_and_sends_when_its_reader_is_there() -> None:
    run = a_run()
    assert run.sampling
    run.sampled(0, (1, 2))
    assert list(run.frames()) == []
    assert run.resume(held()) is None
    assert list(run.frames()) == [Frame(0, 0, (1, 2))]


def test_tokens_are_sent_once() -> None:
    run = a_run()
    run.resume(held())
    run.sampled(0, (1,))
    assert [frame.index for frame in run.frames()] == [0]
    assert list(run.frames()) == []
    run.sampled(0, (2,))
    assert list(run.frames()) == [Frame(0, 1, (2,))]


def test_tokens_that_may_not_be_sent_yet_are_sent_later() -> None:
    run = a_run(SECOND, (1, 2, 3))
    run.resume(held(1))
    assert list(run.frames([1])) == []
    assert list(run.frames([2])) == [Frame(0, 1, (2,))]
    assert list(run.frames([3])) == [Frame(0, 2, (3,))]


def test_a_later_attempt_samples_nothing_until_its_reader_was_heard() -> None:
    run = a_run(SECOND, (1, 2))
    assert not run.sampling
    assert run.resume(held(1, 2)) == MaySample(((),))
    assert run.sampling


def test_a_later_attempt_samples_without_its_reader_when_the_grace_is_over() -> None:
    run = a_run(SECOND, (1, 2))
    assert run.grace_over() == MaySample(((),))
    assert run.grace_over() is None


def test_what_the_reader_holds_beyond_the_journal_is_forced() -> None:
    run = a_run(SECOND, (1, 2))
    assert run.resume(held(1, 2, 3, 4)) == MaySample(((3, 4),))
    assert run.known == [[1, 2, 3, 4]]
    assert list(run.unjournaled()) == [Frame(0, 2, (3, 4))]
    assert list(run.frames()) == []


def test_a_reader_that_is_behind_is_sent_what_it_misses() -> None:
    run = a_run(SECOND, (1, 2, 3))
    run.resume(held(1))
    assert list(run.frames()) == [Frame(0, 1, (2, 3))]


def test_a_reader_with_another_history_goes_on_from_its_own() -> None:
    run = a_run(SECOND, (1, 2, 3))
    assert run.resume(held(1, 9)) == Diverged(((1, 9),))
    assert (run.open, run.sampling) == (False, False)


def test_tokens_that_come_too_late_to_be_forced_are_another_history() -> None:
    run = a_run(SECOND, (1,))
    run.grace_over()
    assert run.resume(held(1, 2)) == Diverged(((1, 2),))


def test_only_the_choice_that_differs_is_rebased() -> None:
    run = a_run(SECOND, (1, 2), (5, 6))
    assert run.resume((Held(1, (9,)), Held(1, (5,)))) == Diverged(((9,), (5, 6)))


def test_a_reader_beyond_a_gap_is_not_forced() -> None:
    assert a_run(SECOND, (1,)).resume((Held(4, (4,)),)) == MaySample(((),))


def test_after_a_redirect_nothing_is_sent_until_the_new_reader_is_open() -> None:
    run = a_run()
    run.resume(held())
    run.sampled(0, (1, 2))
    run.redirect("gateway:2", 2)
    assert (run.gateway, run.reader) == ("gateway:2", 2)
    assert list(run.frames()) == []
    run.resume(held(1))
    assert list(run.frames()) == [Frame(0, 1, (2,))]


def test_what_is_journaled_is_not_journaled_again() -> None:
    run = a_run()
    run.sampled(0, (1, 2, 3))
    run.journal_is(0, 2)
    assert list(run.unjournaled()) == [Frame(0, 2, (3,))]
    assert run.tails() == ((2, (3,)),)


def test_a_journal_that_redis_lost_is_written_again() -> None:
    run = a_run()
    run.sampled(0, (1, 2, 3))
    run.journal_is(0, 3)
    run.journal_is(0, 1)
    assert run.tails() == ((1, (2, 3)),)


def test_a_run_claims_no_journal_beyond_what_it_knows() -> None:
    run = a_run(SECOND, (1,))
    run.journal_is(0, 9)
    assert run.tails() == ((1, ()),)


# --- histories, against a model: two sides state tokens by index ------------------------------------------------------

tokens = st.lists(st.integers(0, 1), max_size=6).map(tuple)
helds = tokens.flatmap(lambda stated: st.builds(Held, st.integers(len(stated), len(stated) + 3), st.just(stated)))


def stated_by(claim: Held) -> dict[int, int]:
    return dict(zip(range(claim.start, claim.count), claim.tokens, strict=True))


@given(known=tokens, claim=helds)
def test_the_first_difference_is_the_first_index_that_both_state_otherwise(known: tuple[int, ...], claim: Held) -> None:
    stated = stated_by(claim)
    differing = [index for index, token in enumerate(known) if stated.get(index, token) != token]
    assert first_difference(known, claim) == min(differing, default=None)


@given(known=tokens, claim=helds)
def test_what_lies_beyond_follows_what_is_known_without_a_gap(known: tuple[int, ...], claim: Held) -> None:
    stated = stated_by(claim)
    follows, index = [], len(known)
    while index in stated:
        follows.append(stated[index])
        index += 1
    assert beyond(known, claim) == tuple(follows)


@given(known=tokens, claim=helds)
def test_a_rebased_history_is_what_is_known_then_what_is_stated(known: tuple[int, ...], claim: Held) -> None:
    assume(claim.start <= len(known))
    both = {**dict(enumerate(known)), **stated_by(claim)}
    assert rebased(known, claim) == tuple(both[index] for index in range(claim.count))


@given(text=tokens, journaled=st.integers(0, 6), delivered=st.integers(0, 6), more=tokens)
def test_a_reader_never_misses_a_token_over_the_death_of_a_worker(
    text: tuple[int, ...], journaled: int, delivered: int, more: tuple[int, ...]
) -> None:
    reader = an_open_reader(FIRST, *text[:delivered])
    run = a_run(SECOND, text[:journaled])
    assert reader.open(SECOND, 1) is None
    assert isinstance(run.resume(reader.delivered()), MaySample)
    run.sampled(0, more)
    for frame in run.frames():
        assert reader.accept(SECOND, frame.choice, frame.index, len(frame.tokens)) == Acceptance.NEW
        reader.deliver(frame.choice, frame.tokens)
    assert reader.delivered()[0].tokens == (*text[: max(journaled, delivered)], *more)
