"""Work of which only the end counts: who may write most begins first, and prompts fill up the steps of others."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.limits import EngineLimits
from tests.unit.engine_builders import Engine, add, limits_of

LEAST_ROWS = 256
LIMITS = limits_of(100_000, 4, 512, 8192, context_tokens=4000, step_budget_ms=None)


def engine_of(asks: Sequence[tuple[int, int]], limits: EngineLimits = LIMITS) -> Engine:
    """An engine to which all come at once: sequences 1 and up, of so many tokens and so many to write."""
    engine = Engine(limits)
    for number, (prompt_tokens, max_tokens) in enumerate(asks, 1):
        ask = add(number, [number % 1000] * prompt_tokens, max_tokens=max_tokens, stop_token_ids=())
        engine.planner.add(ask, now_ms=0)
    return engine


def order_of_beginning(steps: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    return list(dict.fromkeys(sequence_id for step in steps for sequence_id, _ in step))


def rows(steps: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    return [sum(tokens for _, tokens in step) for step in steps]


def test_who_may_write_most_begins_first_whatever_its_prompt() -> None:
    steps = engine_of([(10, 5), (1000, 100), (10, 50), (20, 400)]).steps()
    assert order_of_beginning(steps) == [4, 2, 3, 1]


def test_prompts_whose_answers_are_short_fill_up_the_steps_of_a_long_one_which_ends_no_later_for_them() -> None:
    asks = [(100, 500), *[(1000, 1)] * 150]
    steps = engine_of(asks).steps()
    assert len(steps) == 500, "as many as the long answer takes alone"
    spread = rows(steps)[1:450]
    assert max(spread) < 400, "150,000 tokens in 500 steps are 300 a step"
    assert min(spread) >= LEAST_ROWS


def test_answers_that_are_all_as_long_are_begun_as_soon_as_can_be() -> None:
    steps = engine_of([(1000, 50)] * 40).steps()
    assert rows(steps)[0] == LIMITS.max_prefill_tokens_per_step
    assert len(steps) == 5 + 49, "40,000 tokens are five steps"


def test_who_waits_alone_for_its_prompt_is_not_held_back() -> None:
    steps = engine_of([(6000, 3)], replace(LIMITS, context_tokens=8000)).steps()
    assert rows(steps) == [6000, 1, 1]


def test_while_others_still_come_prompts_are_not_spread() -> None:
    engine = engine_of([(100, 500), *[(3000, 1)] * 20])
    for number in range(22, 28):
        engine.planner.add(add(number, [number] * 3000, max_tokens=1, stop_token_ids=()), now_ms=0)
        step = engine.step()
        assert step
        assert step.num_tokens >= LIMITS.max_prefill_tokens_per_step, "more may wait elsewhere until there is room here"
    assert max(rows(engine.steps())) == LEAST_ROWS


def test_a_step_is_filled_up_to_a_size_that_costs_no_more() -> None:
    sizes = (64, 288, 320, 448, 512)
    steps = engine_of([(100, 500), *[(1000, 1)] * 150], replace(LIMITS, filled_up_to=sizes)).steps()
    assert {*rows(steps)[1:450]} <= {*sizes}


def test_later_ones_that_may_write_more_overtake_a_short_answer_for_a_while_only() -> None:
    engine = engine_of([(50, 12), (50, 12), (100, 2)], replace(LIMITS, max_sequences=2))
    number = 3
    while 3 not in engine.ends():
        if engine.planner.num_waiting < 3:
            number += 1
            engine.planner.add(add(number, [number] * 600, max_tokens=12, stop_token_ids=()), now_ms=0)
        assert engine.step()
    overtook = [ended for ended in engine.ends() if ended > 3]
    assert len(overtook) in (8, 9, 10), "while 512 tokens are prefilled for each of the 10 that they may write more"


def test_batch_work_keeps_no_step_short_for_those_that_decode() -> None:
    engine = engine_of([(10, 100)] * 20)
    engine.step()
    late = add(99, [99] * 3000, max_tokens=200, stop_token_ids=())
    engine.planner.add(late, now_ms=0)
    step = engine.step()
    assert step
    assert step.num_tokens == 3000 + 20, "its answer is the longest by far"


@settings(max_examples=50, deadline=None)
@given(
    asks=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=40),
    num_blocks=st.integers(300, 2000),
    max_sequences=st.integers(1, 50),
    most_tokens=st.sampled_from([16, 300, 8192]),
    sizes=st.sampled_from([(), (32, 64, 300), (256, 512, 2048)]),
)
def test_whatever_comes_each_answer_is_written_and_no_step_is_over_its_limit(
    asks: list[tuple[int, int]], num_blocks: int, max_sequences: int, most_tokens: int, sizes: tuple[int, ...]
) -> None:
    limits = limits_of(num_blocks, 4, max_sequences, most_tokens, context_tokens=1000, step_budget_ms=None)
    engine = engine_of(asks, replace(limits, filled_up_to=sizes))
    for step in engine.steps():
        assert sum(tokens for _, tokens in step if tokens > 1) <= most_tokens
    assert {number: len(engine.tokens(number)) for number in range(1, len(asks) + 1)} == {
        number: max_tokens for number, (_, max_tokens) in enumerate(asks, 1)
    }


@pytest.mark.parametrize("least_steps", [40, 200])
def test_no_answer_ends_behind_the_longest_by_waiting(least_steps: int) -> None:
    asks = [(50, least_steps), *[(300, 1 + number % 30) for number in range(60)]]
    assert len(engine_of(asks).steps()) == least_steps
