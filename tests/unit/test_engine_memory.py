"""Blocks: what was computed before is found, what is short is taken from the last, choices share their prompt."""

from collections.abc import Sequence

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.sequence import SequenceId
from tests.unit.engine_builders import Engine, add, limits_of

PROMPT = list(range(200, 213))
"""13 tokens: three full blocks of 4, and one."""


def engine_of(num_blocks: int = 16, max_prefill_tokens_per_step: int = 64) -> Engine:
    return Engine(limits_of(num_blocks, 4, max_prefill_tokens_per_step=max_prefill_tokens_per_step))


def cached_tokens(engine: Engine, sequence_id: int) -> int:
    return next(output.cached_tokens for output in engine.outputs if output.sequence_id == sequence_id)


def run(engine: Engine, *sequences: engine_pb2.AddSequence) -> list[list[tuple[int, int]]]:
    for sequence in sequences:
        engine.planner.add(sequence, now_ms=0)
    return engine.steps()


# The prefix cache


def test_a_prompt_that_was_computed_before_begins_behind_its_full_blocks() -> None:
    engine = engine_of()
    run(engine, add(1, PROMPT, max_tokens=1))
    assert run(engine, add(2, [*PROMPT, 300, 301], max_tokens=1)) == [[(2, 3)]]
    assert cached_tokens(engine, 1) == 0
    assert cached_tokens(engine, 2) == 12


@pytest.mark.parametrize(("most_tokens", "steps"), [(13, [[13], [1]]), (64, [[13, 1]]), (8, [[8], [5, 1]])])
def test_what_a_step_computes_is_found_by_the_next_prompt_at_once(most_tokens: int, steps: list[list[int]]) -> None:
    engine = engine_of(max_prefill_tokens_per_step=most_tokens)
    engine.planner.add(add(1, PROMPT, max_tokens=1), now_ms=0)
    engine.planner.add(add(2, PROMPT, max_tokens=1), now_ms=0)
    # None of them is done before the next one is planned.
    plans = [engine.planner.plan() for _ in steps]
    assert [[len(chunk.token_ids) for chunk in plan.chunks] for plan in plans if plan] == steps


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    engine = engine_of()
    run(engine, add(1, PROMPT[:12], max_tokens=1))
    assert run(engine, add(2, PROMPT[:12], max_tokens=1)) == [[(2, 4)]]
    assert engine.tokens(2) == [12]


def test_an_answer_is_found_as_the_beginning_of_the_next_turns_prompt() -> None:
    engine = engine_of()
    run(engine, add(1, PROMPT, max_tokens=4))
    # Of the 17 tokens, the last was sampled and never computed.
    assert run(engine, add(2, [*PROMPT, *engine.tokens(1), 7], max_tokens=1)) == [[(2, 2)]]


def test_another_tenants_prompt_is_not_found() -> None:
    engine = engine_of()
    engine.runner.salts = {1: b"one", 2: b"other", 3: b"one"}
    run(engine, add(1, PROMPT, max_tokens=1, salt=b"one"))
    assert run(engine, add(2, PROMPT, max_tokens=1, salt=b"other")) == [[(2, 13)]]
    assert run(engine, add(3, PROMPT, max_tokens=1, salt=b"one")) == [[(3, 1)]]


def test_a_block_is_only_found_behind_the_same_blocks() -> None:
    engine = engine_of()
    run(engine, add(1, [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1))
    assert run(engine, add(2, [4, 3, 2, 1, 5, 6, 7, 8, 9], max_tokens=1)) == [[(2, 9)]]


def test_a_prompt_is_found_while_the_one_that_computed_it_still_runs() -> None:
    engine = engine_of()
    engine.planner.add(add(1, PROMPT, max_tokens=9), now_ms=0)
    engine.step()
    engine.planner.add(add(2, PROMPT, max_tokens=1), now_ms=0)
    plan = engine.step()
    assert plan is not None
    assert [(chunk.sequence_id, len(chunk.token_ids)) for chunk in plan.chunks] == [(1, 1), (2, 1)]


def test_what_was_unused_for_longest_makes_room_first() -> None:
    engine = engine_of(num_blocks=8)
    old, new = list(range(100, 109)), list(range(300, 309))
    run(engine, add(1, old, max_tokens=1))
    run(engine, add(2, new, max_tokens=1))
    run(engine, add(3, list(range(400, 422)), max_tokens=1))
    assert run(engine, add(4, new, max_tokens=1)) == [[(4, 1)]]
    assert run(engine, add(5, old, max_tokens=1)) == [[(5, 9)]]


def test_a_prompt_whose_log_probabilities_are_asked_for_is_computed_whole() -> None:
    engine = engine_of()
    run(engine, add(1, PROMPT, max_tokens=1))
    assert run(engine, add(2, PROMPT, max_tokens=1, prompt_logprobs=0)) == [[(2, 13)]]
    assert [-scored.logprob for scored in engine.outputs[-1].given_logprobs] == PROMPT[1:]
    assert engine.outputs[-1].given_from == 1


# Shortage


def test_blocks_are_taken_as_a_sequence_grows() -> None:
    engine = engine_of()
    engine.planner.add(add(1, prompt=4, max_tokens=9), now_ms=0)
    free = []
    while engine.step():
        free.append(engine.planner.num_free_blocks)
    assert free == [15, 14, 14, 14, 14, 13, 13, 13, 16]


def test_when_blocks_run_out_the_last_sequence_gives_its_own_and_is_computed_again() -> None:
    engine = engine_of(num_blocks=6)
    for sequence_id in (1, 2):
        engine.planner.add(add(sequence_id, prompt=8, max_tokens=10), now_ms=0)
    engine.steps()
    assert engine.planner.num_preemptions > 0
    assert engine.tokens(1) == list(range(8, 18))
    assert engine.tokens(2) == list(range(8, 18))
    ends = [output.sequence_id for output in engine.outputs if output.end]
    assert ends == [1, 2]


def test_a_preempted_sequence_is_computed_again_only_where_its_blocks_were_overwritten() -> None:
    engine = engine_of(num_blocks=6)
    run(engine, add(1, prompt=8, max_tokens=10), add(2, prompt=8, max_tokens=10))
    again = [chunk for plan in engine.runner.plans[2:] for chunk in plan.chunks if len(chunk.token_ids) > 1]
    assert [chunk.sequence_id for chunk in again] == [2]
    assert again[0].first_position > 0


def test_a_new_sequence_is_not_admitted_at_the_price_of_those_that_run() -> None:
    engine = engine_of(num_blocks=4)
    engine.planner.add(add(1, prompt=8, max_tokens=8), now_ms=0)
    engine.step()
    engine.planner.add(add(2, prompt=6, max_tokens=1), now_ms=0)
    assert [[sequence for sequence, _ in step] for step in engine.steps()] == [[1]] * 7 + [[2]]
    assert engine.planner.num_preemptions == 0


def test_a_sequence_that_needs_every_block_is_computed_after_all_others_gave_way() -> None:
    engine = engine_of(num_blocks=4)
    run(engine, *(add(number, prompt=4, max_tokens=12) for number in (1, 2, 3)))
    assert [output.sequence_id for output in engine.outputs if output.end] == [1, 2, 3]
    assert [len(engine.tokens(sequence_id)) for sequence_id in (1, 2, 3)] == [12, 12, 12]


def test_a_preempted_sequence_may_be_aborted_or_expire() -> None:
    engine = engine_of(num_blocks=6)
    engine.planner.add(add(1, prompt=8, max_tokens=10), now_ms=0)
    engine.planner.add(add(2, prompt=8, max_tokens=10, remaining_ms=5), now_ms=0)
    while engine.planner.num_preemptions == 0:
        engine.step()
    engine.planner.expire(now_ms=10)
    engine.steps()
    assert engine.ends() == {1: engine_pb2.SEQUENCE_END_LENGTH, 2: engine_pb2.SEQUENCE_END_EXPIRED}
    assert engine.planner.num_free_blocks == 6


# Choices of one request


def three_choices(known: Sequence[int] = (), held: bool = False) -> list[engine_pb2.AddSequence]:
    return [
        add(number, PROMPT, max_tokens=6, fork_of=0 if number == 1 else 1, known=known, held=held)
        for number in (1, 2, 3)
    ]


def test_the_prompt_of_several_choices_is_computed_once() -> None:
    engine = engine_of()
    assert run(engine, *three_choices())[:2] == [[(1, 13)], [(1, 1), (2, 1), (3, 1)]]
    assert {tuple(engine.tokens(number)) for number in (1, 2, 3)} == {(13, 14, 15, 16, 17, 18)}


def test_choices_share_the_blocks_of_the_prompt_and_copy_the_one_that_each_writes_to() -> None:
    # 14 tokens: three full blocks, and one that holds a token of the prompt and the answer's first.
    engine = engine_of()
    prompt = [*PROMPT, 213]
    for number in (1, 2, 3):
        engine.planner.add(add(number, prompt, max_tokens=6, fork_of=0 if number == 1 else 1), now_ms=0)
    engine.step()
    plan = engine.step()
    assert plan is not None
    tables = [chunk.block_table for chunk in plan.chunks]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    assert [copy.source for copy in plan.block_copies] == [tables[0][3]] * 2
    assert engine.planner.num_free_blocks == 16 - 6


def test_a_choice_goes_on_alone_when_the_first_ended_before_it_began() -> None:
    engine = engine_of()
    first, second, _ = three_choices()
    engine.planner.add(first, now_ms=0)
    engine.planner.add(second, now_ms=0)
    engine.planner.abort(SequenceId(1))
    assert engine.steps()[0] == [(2, 13)]
    assert engine.tokens(2) == [13, 14, 15, 16, 17, 18]


def test_choices_that_are_continued_share_the_prompt_and_compute_what_is_known_of_each() -> None:
    engine = engine_of()
    assert run(engine, *three_choices(known=[50, 51]))[:2] == [[(1, 15)], [(1, 1), (2, 3), (3, 3)]]


def test_held_choices_share_the_prompt_too() -> None:
    engine = engine_of()
    run(engine, *three_choices(held=True))
    for number in (1, 2, 3):
        engine.planner.release(SequenceId(number), [])
    assert engine.steps()[0] == [(1, 1), (2, 1), (3, 1)]
    assert engine.tokens(3) == [13, 14, 15, 16, 17, 18]


def test_only_the_prompts_own_tokens_count_as_cached_not_what_another_choice_computed() -> None:
    engine = engine_of()
    run(engine, *three_choices())
    assert [cached_tokens(engine, number) for number in (1, 2, 3)] == [0, 0, 0]


# A step's time


@pytest.mark.parametrize(("budget_ms", "tokens"), [(1e9, 64), (70.0, 37), (10.0, 4)])
def test_prefill_is_cut_to_the_steps_time_while_others_decode_but_goes_on(budget_ms: float, tokens: int) -> None:
    """By the model that no step has taught yet: 30 ms a step, 1 ms a token, 0.0005 ms an attended one."""
    engine = Engine(limits_of(64, 4, max_prefill_tokens_per_step=64, context_tokens=200, step_budget_ms=budget_ms))
    engine.planner.add(add(1, prompt=4, max_tokens=50), now_ms=0)
    engine.step()
    engine.planner.add(add(2, prompt=list(range(300, 400)), max_tokens=1), now_ms=0)
    plan = engine.step()
    assert plan is not None
    (_, prefill) = plan.chunks
    assert len(prefill.token_ids) == pytest.approx(tokens, abs=2)


def test_a_prompt_alone_is_not_cut_to_a_time() -> None:
    engine = Engine(limits_of(64, 4, max_prefill_tokens_per_step=64, context_tokens=200, step_budget_ms=1.0))
    engine.planner.add(add(1, prompt=list(range(300, 364)), max_tokens=1), now_ms=0)
    assert engine.steps() == [[(1, 64)]]
