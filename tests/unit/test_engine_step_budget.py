"""How long a step takes in which others decode: a budget, stretched while a backlog lasts, at times exceeded."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.limits import EngineLimits
from services.worker.engine.planner import Planner
from services.worker.engine.step_budget import LATE_SHARE, LONGEST_STEP, MOST_SAVED, MOST_STRETCH, StepBudget
from services.worker.engine.step_plan import StepPlan
from services.worker.engine.step_time import StepTimeModel
from tests.unit.engine_builders import add, blind_result, limits_of

BUDGET_MS = 40.0
STEPS = st.lists(st.tuples(st.integers(0, 80), st.sampled_from([30.0, 79.0, 81.0, 1000.0])), max_size=200)
"""Decodes, and what the first prompt would take alone, ms; nothing else waits."""


def lengths_ms(steps: list[tuple[int, float]]) -> list[float | None]:
    """How long each step may take."""
    budget, most_ms = StepBudget(), []
    for num_decodes, prompt_ms in steps:
        budget.begin_step(num_decodes, prompt_ms)
        most_ms.append(budget.spend(BUDGET_MS, num_decodes, prompt_ms))
    return most_ms


@given(steps=STEPS, repeated=st.integers(1, 5), window=st.tuples(st.integers(0, 999), st.integers(1, 999)))
def test_of_any_tokens_in_a_row_less_than_one_in_a_hundred_are_late_but_for_those_saved(
    steps: list[tuple[int, float]], repeated: int, window: tuple[int, int]
) -> None:
    rows = [
        (num_decodes, most_ms)
        for (num_decodes, _), most_ms in zip(steps * repeated, lengths_ms(steps * repeated), strict=True)
    ]
    first, count = window
    rows = rows[first : first + count]
    late = sum(num_decodes for num_decodes, most_ms in rows if most_ms and most_ms > MOST_STRETCH * BUDGET_MS)
    assert late <= MOST_SAVED + LATE_SHARE * sum(num_decodes for num_decodes, _ in rows)


@given(steps=STEPS)
def test_other_steps_keep_the_budget_or_what_it_is_stretched_to(steps: list[tuple[int, float]]) -> None:
    for (num_decodes, prompt_ms), most_ms in zip(steps, lengths_ms(steps), strict=True):
        if most_ms is None:
            assert num_decodes == 0, "nobody waits for it"
        elif most_ms == LONGEST_STEP * BUDGET_MS:
            assert prompt_ms > 2 * BUDGET_MS, "few steps would do"
        else:
            assert BUDGET_MS <= most_ms <= MOST_STRETCH * BUDGET_MS


def test_a_backlog_that_lasts_stretches_the_budget_and_one_that_comes_and_goes_does_not() -> None:
    budget = StepBudget()
    for _ in range(10):
        budget.begin_step(80, 2 * BUDGET_MS)
    assert budget.stretched_ms(BUDGET_MS) == BUDGET_MS
    for _ in range(500):
        budget.begin_step(80, 2 * BUDGET_MS)
    assert budget.stretched_ms(BUDGET_MS) == pytest.approx(MOST_STRETCH * BUDGET_MS)
    for _ in range(500):
        budget.begin_step(80, 0.0)
    assert budget.stretched_ms(BUDGET_MS) == BUDGET_MS


# In the planner: 30 ms a step, 1 ms a token, as the model thinks that no step has taught yet

BLOCK_TOKENS, MOST_PROMPT_TOKENS = 4, 64
LIMITS = limits_of(6000, BLOCK_TOKENS, 80, MOST_PROMPT_TOKENS, context_tokens=1000, step_budget_ms=BUDGET_MS)


class Decoding:
    """A planner, and sequences 1 to n that decode all along; prompts are of others."""

    def __init__(self, num_decodes: int, num_steps: int, limits: EngineLimits = LIMITS) -> None:
        self.num_decodes = num_decodes
        self.planner = Planner(limits, StepTimeModel())
        self.ended: set[int] = set()
        for number in range(1, num_decodes + 1):
            self.planner.add(add(number, prompt=1, max_tokens=900), now_ms=0)
        for _ in range(num_steps):
            self.step()

    def ask(self, number: int, prompt_tokens: int) -> None:
        self.planner.add(add(number, prompt=[number] * prompt_tokens, max_tokens=1), now_ms=0)

    def step(self) -> StepPlan:
        plan = self.planner.plan()
        assert plan is not None
        outputs = self.planner.complete(plan, blind_result(plan))
        self.ended.update(output.sequence_id for output in outputs if output.end)
        return plan

    def prefilled(self) -> int:
        """Tokens of prompts in the next step."""
        return self.step().num_tokens - self.num_decodes


def test_a_long_prompt_takes_one_long_step_when_enough_tokens_were_in_time() -> None:
    engine = Decoding(num_decodes=1, num_steps=140)
    engine.ask(99, prompt_tokens=110)
    assert engine.prefilled() == MOST_PROMPT_TOKENS
    assert [engine.prefilled() for _ in range(2)] == [pytest.approx(8, abs=2)] * 2, "of 140 tokens one may be late"


@pytest.mark.parametrize(("num_steps", "prompt_tokens"), [(20, 110), (140, 70)])
def test_a_prompt_is_cut_to_the_budget_after_few_tokens_and_if_few_steps_do(num_steps: int, prompt_tokens: int) -> None:
    engine = Decoding(1, num_steps)
    engine.ask(99, prompt_tokens)
    assert engine.prefilled() == pytest.approx(8, abs=2)


def test_where_tokens_take_long_no_step_is_longer_than_five_budgets() -> None:
    engine = Decoding(num_decodes=1, num_steps=300, limits=replace(LIMITS, max_prefill_tokens_per_step=512))
    engine.ask(99, prompt_tokens=900)
    plan = engine.step()
    assert StepTimeModel().predict_ms(plan) == pytest.approx(LONGEST_STEP * BUDGET_MS, abs=2)


def test_shorter_prompts_go_before_a_long_step() -> None:
    engine = Decoding(num_decodes=1, num_steps=300)
    engine.ask(98, prompt_tokens=500)
    engine.ask(99, prompt_tokens=4)
    assert engine.prefilled() == pytest.approx(8, abs=2)
    assert 99 in engine.ended
    assert engine.prefilled() == MOST_PROMPT_TOKENS


def test_beside_many_decodes_no_step_is_long() -> None:
    engine = Decoding(num_decodes=MOST_SAVED + 1, num_steps=200)
    engine.ask(99, prompt_tokens=500)
    assert engine.prefilled() == BLOCK_TOKENS


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 40), st.integers(2, 300)), max_size=8),
    num_decodes=st.integers(1, 6),
    num_steps=st.integers(1, 200),
)
def test_whatever_comes_few_steps_are_long_a_prompt_goes_on_and_each_ends(
    prompts: list[tuple[int, int]], num_decodes: int, num_steps: int
) -> None:
    """Prompts come so many steps after the one before."""
    engine, predicts = Decoding(num_decodes, num_steps), StepTimeModel()
    num_tokens, num_late = num_steps * num_decodes, 0

    def step() -> None:
        nonlocal num_tokens, num_late
        waits = engine.planner.waiting_prefill_tokens > 0
        plan = engine.step()
        assert plan.num_tokens > num_decodes or not waits
        num_tokens += num_decodes
        if predicts.predict_ms(plan) > MOST_STRETCH * BUDGET_MS + 1:
            num_late += num_decodes

    for number, (steps, prompt_tokens) in enumerate(prompts, 100):
        for _ in range(steps):
            step()
        engine.ask(number, prompt_tokens)
    for _ in range(sum(prompt_tokens for _, prompt_tokens in prompts)):
        step()
        if len(engine.ended) == len(prompts):
            break
    assert len(engine.ended) == len(prompts)
    assert num_late <= LATE_SHARE * num_tokens
