"""Work of which only the end counts: who may write most begins first, and prompts fill up the steps of others."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.limits import EngineLimits
from services.worker.engine.step_plan import StepPlan, StepResult
from tests.unit.engine_builders import Engine, add, blind_result, limits_of

LEAST_ROWS = 256
LIMITS = limits_of(100_000, 4, 512, 8192, context_tokens=4000, step_budget_ms=None)


class Batch(Engine):
    """An engine to which all come at once: sequences 1 and up, of so many tokens and so many to write."""

    def __init__(self, asks: Sequence[tuple[int, int]], limits: EngineLimits = LIMITS) -> None:
        super().__init__(limits)
        for number, (prompt_tokens, max_tokens) in enumerate(asks, 1):
            self.ask(number, prompt_tokens, max_tokens)

    def ask(self, number: int, prompt_tokens: int, max_tokens: int, *, held: bool = False) -> None:
        prompt = [number] * prompt_tokens
        self.planner.add(add(number, prompt, max_tokens=max_tokens, held=held, stop_token_ids=()), now_ms=0)

    def next_rows(self) -> int:
        plan = self.step()
        assert plan
        return plan.num_tokens


class LongBatch(Batch):
    """Of thousands of tokens."""

    def compute(self, plan: StepPlan) -> StepResult:
        return blind_result(plan)


def order_of_beginning(steps: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    return list(dict.fromkeys(sequence_id for step in steps for sequence_id, _ in step))


def rows(steps: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    return [sum(tokens for _, tokens in step) for step in steps]


def test_who_may_write_most_begins_first_whatever_its_prompt() -> None:
    steps = LongBatch([(10, 5), (1000, 100), (10, 50), (20, 400)]).steps()
    assert order_of_beginning(steps) == [4, 2, 3, 1]


def test_prompts_whose_answers_are_short_fill_up_the_steps_of_a_long_one_which_ends_no_later_for_them() -> None:
    asks = [(100, 500), *[(1000, 1)] * 150]
    steps = LongBatch(asks).steps()
    assert len(steps) == 500, "as many as the long answer takes alone"
    spread = rows(steps)[1:450]
    assert max(spread) < 400, "150,000 tokens in 500 steps are 300 a step"
    assert min(spread) >= LEAST_ROWS


def test_the_last_prompt_is_done_in_the_very_step_in_which_the_longest_answer_ends() -> None:
    spread = rows(LongBatch([(100, 301), *[(1000, 1)] * 98, (92, 1)]).steps())
    assert spread[0] == LIMITS.max_prefill_tokens_per_step
    assert spread[1] == 1 + 300, "90,000 tokens in the 300 steps that are left"
    assert len(spread) == 301


def test_prompts_are_spread_by_what_goes_before_them_not_by_what_came_before_them() -> None:
    spread = rows(LongBatch([*[(1000, 1)] * 60, (100, 301), *[(1000, 200)] * 30]).steps())
    decodes, left, steps = 1 + 8, 90_000 - 8092, 300
    assert spread[1] == decodes + left // steps + 1, "21,908 of them within the first 101 steps are fewer a step"


def test_answers_that_are_all_as_long_are_begun_as_soon_as_can_be() -> None:
    steps = LongBatch([(1000, 50)] * 40).steps()
    assert rows(steps)[0] == LIMITS.max_prefill_tokens_per_step
    assert len(steps) == 5 + 49, "40,000 tokens are five steps"


def test_who_waits_alone_for_its_prompt_is_not_held_back() -> None:
    steps = LongBatch([(6000, 3)], replace(LIMITS, context_tokens=8000)).steps()
    assert rows(steps) == [6000, 1, 1]


def test_no_step_waits_for_answers_longer_than_any_is_counted_on() -> None:
    no_limit_given = [(tokens, 100_000 - tokens) for tokens in (1000, 400, 2000, 100, 1500) for _ in range(8)]
    batch = LongBatch(no_limit_given, replace(LIMITS, context_tokens=100_000))
    assert sum(batch.next_rows() for _ in range(5)) >= 40_000, (
        "answers that may fill the context rarely do: none of their prompts is put off"
    )


def test_who_is_held_is_no_answer_to_wait_for() -> None:
    batch = LongBatch([(100, 2), *[(1000, 1)] * 30])
    batch.ask(99, 20, 3000, held=True)
    assert len(batch.steps()) == 4, "30,100 tokens are four steps"


def test_while_others_still_come_prompts_are_not_spread() -> None:
    engine = LongBatch([(100, 500), *[(3000, 1)] * 20])
    for number in range(22, 28):
        engine.ask(number, 3000, 1)
        assert engine.next_rows() >= LIMITS.max_prefill_tokens_per_step, "more may wait until there is room here"
    assert max(rows(engine.steps())) == LEAST_ROWS


def test_a_step_is_filled_up_to_a_size_that_costs_no_more() -> None:
    sizes = (64, 288, 320, 448, 512)
    steps = LongBatch([(100, 500), *[(1000, 1)] * 150], replace(LIMITS, filled_up_to=sizes)).steps()
    assert {*rows(steps)[1:450]} <= {*sizes}


def test_more_than_the_largest_size_is_as_much_as_a_step_takes() -> None:
    asks = [(100, 500), *[(1000, 490)] * 40]
    steps = LongBatch(asks, replace(LIMITS, filled_up_to=(256, 512, 1024))).steps()
    assert [tokens for tokens in rows(steps) if tokens > 1024] == [8192, 8201, 8209, 8217, 7365], (
        "11 steps are left for them"
    )


def test_later_ones_that_may_write_more_overtake_a_short_answer_for_a_while_only() -> None:
    engine = LongBatch([(50, 12), (50, 12), (100, 2)], replace(LIMITS, max_sequences=2))
    number = 3
    while 3 not in engine.ends():
        if engine.planner.num_waiting < 3:
            number += 1
            engine.ask(number, 600, 12)
        assert engine.step()
    overtook = [ended for ended in engine.ends() if ended > 3]
    assert len(overtook) in (8, 9, 10), "while 512 tokens are prefilled for each of the 10 that they may write more"


def test_batch_work_keeps_no_step_short_for_those_that_decode() -> None:
    engine = LongBatch([(10, 100)] * 20)
    engine.step()
    engine.ask(99, 3000, 200)
    assert engine.next_rows() == 3000 + 20, "its answer is the longest by far"


@settings(max_examples=50, deadline=None)
@given(
    asks=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=30),
    num_blocks=st.integers(90, 900),
    max_sequences=st.integers(1, 50),
    most_tokens=st.sampled_from([16, 300, 2048]),
    sizes=st.sampled_from([(), (32, 64, 300), (256, 512, 2048)]),
)
def test_whatever_comes_each_answer_is_written_and_no_step_is_over_its_limit(
    asks: list[tuple[int, int]], num_blocks: int, max_sequences: int, most_tokens: int, sizes: tuple[int, ...]
) -> None:
    limits = limits_of(num_blocks, 4, max_sequences, most_tokens, context_tokens=350, step_budget_ms=None)
    engine = Batch(asks, replace(limits, filled_up_to=sizes))
    while plan := engine.step():
        of_prompts = [c for c in plan.chunks if c.first_position < asks[c.sequence_id - 1][0]]
        assert sum(len(chunk.token_ids) for chunk in of_prompts) <= most_tokens
    assert {number: len(engine.tokens(number)) for number in range(1, len(asks) + 1)} == {
        number: max_tokens for number, (_, max_tokens) in enumerate(asks, 1)
    }


@pytest.mark.parametrize("least_steps", [40, 200])
def test_no_answer_ends_behind_the_longest_by_waiting(least_steps: int) -> None:
    asks = [(50, least_steps), *[(300, 1 + number % 30) for number in range(60)]]
    assert len(LongBatch(asks).steps()) == least_steps
