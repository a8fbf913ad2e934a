"""What requests cost is told by the workers: their step times, their room, and how long answers turned out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.fleet.v1.request_pb2 import StepTime, WorkerReport
from services.common.ids import WorkerId
from services.scheduler.ledger import Account
from services.scheduler.work import UNKNOWN_ANSWER_TOKENS, AnswerLengths, Pace, mean_step_time
from tests.unit.scheduler_builders import W1, W2, a_reservation, an_info

WORKER = an_info(num_blocks=1000, max_sequences=10, max_prefill_tokens_per_step=100)
PACE = Pace.of(StepTime(fixed_ms=20, ms_per_token=1), WORKER)


def test_a_prompt_bears_its_part_of_steps_that_are_full_of_prompts() -> None:
    prompt = a_reservation(prompt_tokens=200)
    assert PACE.request_ms(prompt, 0) == 2 * 20 + 200 * 1


def test_an_answer_bears_its_part_of_steps_that_are_full_of_answers() -> None:
    empty = a_reservation(prompt_tokens=0, max_tokens=50)
    assert PACE.request_ms(empty, 50) == 50 * 20 / 10 + 50 * 1


def test_what_fills_the_cache_leaves_no_room_for_company_to_share_steps_with() -> None:
    whole_cache = a_reservation(prompt_tokens=0, max_tokens=16_000)
    assert PACE.share(whole_cache) == 1
    assert PACE.request_ms(whole_cache, 50) == 50 * 20 + 50 * 1


def test_every_choice_is_a_sequence() -> None:
    choices = a_reservation(prompt_tokens=0, max_tokens=50, num_choices=3)
    assert PACE.request_ms(choices, 50) == 3 * 50 * 20 / 10 + 3 * 50 * 1


def test_tokens_of_long_contexts_cost_what_they_attend_to() -> None:
    pace = Pace.of(StepTime(ms_per_attended_token=0.5), WORKER)
    assert pace.request_ms(a_reservation(prompt_tokens=3), 0) == 0.5 * (1 + 2 + 3)
    later = a_reservation(prompt_tokens=0, generated_tokens=0)
    assert pace.request_ms(later, 10) == 0.5 * 10 * 5


@given(st.integers(0, 5000), st.integers(1, 4), st.floats(0, 500), st.floats(0, 500))
def test_more_to_do_never_costs_less(prompt: int, choices: int, tokens: float, more: float) -> None:
    pace = Pace.of(StepTime(fixed_ms=7, ms_per_token=0.3, ms_per_attended_token=0.001), WORKER)
    needs = a_reservation(prompt_tokens=prompt, num_choices=choices)
    assert 0 <= pace.request_ms(needs, tokens) <= pace.request_ms(needs, tokens + more)


# The pool's pace ---------------------------------------------------------------------------------------------------


def an_account(report: WorkerReport) -> Account:
    account = Account(an_info(WorkerId(report.worker_id)))
    account.reported(report)
    return account


def test_steps_take_the_mean_of_what_workers_report() -> None:
    fast = an_account(WorkerReport(worker_id=W1, step_time=StepTime(fixed_ms=10, ms_per_token=1)))
    slow = an_account(WorkerReport(worker_id=W2, step_time=StepTime(fixed_ms=30, ms_per_token=2)))
    assert mean_step_time([fast, slow], last=None) == StepTime(fixed_ms=20, ms_per_token=1.5)


def test_workers_that_made_no_step_say_nothing_of_it() -> None:
    new, last = an_account(WorkerReport(worker_id=W1)), StepTime(fixed_ms=10)
    assert mean_step_time([new], last=None) is None
    assert mean_step_time([new], last) is last
    assert mean_step_time([], last) is last


# How long answers are ----------------------------------------------------------------------------------------------


def ended(worker: str, choices: int, tokens: int) -> WorkerReport:
    return WorkerReport(worker_id=worker, ended_choices=choices, ended_choice_tokens=tokens)


def test_until_answers_have_ended_a_little_is_expected_and_never_more_than_was_asked_for() -> None:
    lengths = AnswerLengths()
    assert lengths.expected_tokens(a_reservation(max_tokens=8_000)) == UNKNOWN_ANSWER_TOKENS
    assert lengths.expected_tokens(a_reservation(max_tokens=11)) == 11


def test_the_length_of_answers_is_learned_from_those_that_ended_since_the_last_look() -> None:
    lengths = AnswerLengths()
    lengths.look([ended(W1, 10, 500)])
    assert lengths.mean_tokens == 50
    lengths.look([ended(W1, 10, 500)])
    assert lengths.mean_tokens == 50, "nothing new"
    lengths.look([ended(W1, 110, 500 + 100 * 90), ended(W2, 0, 0)])
    assert lengths.mean_tokens == pytest.approx(90, abs=0.1), "a hundred outweigh ten"


def test_a_worker_under_a_new_id_begins_at_nothing() -> None:
    lengths = AnswerLengths()
    lengths.look([ended(W1, 50, 5_000)])
    lengths.look([ended(W2, 50, 5_000)])
    assert lengths.mean_tokens == pytest.approx(100)


def test_what_was_generated_already_is_not_expected_again_but_one_token_always_is() -> None:
    lengths = AnswerLengths(mean_tokens=100)
    half = a_reservation(max_tokens=1_000, generated_tokens=120, num_choices=2)
    assert lengths.expected_tokens(half) == 40
    beyond = a_reservation(max_tokens=1_000, generated_tokens=300)
    assert lengths.expected_tokens(beyond) == 1
