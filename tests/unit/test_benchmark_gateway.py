"""The benchmark of the fleet itself: its engine keeps time, and its bounds are read the right way round."""

import pytest

from benchmarks.gateway.figures import Figure
from benchmarks.gateway.paced_engine import FIRST_TOKEN, PacedRunner
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan


def a_chunk(sample_index: int | None) -> SequenceChunk:
    return SequenceChunk(SequenceId(1), (5,), 0, (), SamplingParameters(), sample_index)


def test_a_paced_step_samples_where_a_token_is_wanted_and_only_there() -> None:
    result = PacedRunner(0.0).launch(StepPlan(1, (a_chunk(0), a_chunk(None), a_chunk(7)))).result()
    assert [chunk.token_id for chunk in result.chunks] == [FIRST_TOKEN, None, FIRST_TOKEN + 7]


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(10, True, True), (9, True, False), (10, False, True), (11, False, False)]
)
def test_a_bound_is_a_least_or_a_most(value: float, at_least: bool, met: bool) -> None:
    assert Figure("a figure", value, 10, at_least, "").met is met
