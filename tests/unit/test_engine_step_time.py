"""A step's time is predicted from those before it."""

import pytest

from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.engine.step_time import INITIAL, StepTimeCoefficients, StepTimeModel, StepWork, on_a_cpu
from services.worker.runner.models.decoder_weights import DecoderConfig

GREEDY = SamplingParameters(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, choice=0)


def a_plan(*chunks: tuple[int, int]) -> StepPlan:
    """Chunks as (first position, tokens)."""
    return StepPlan(
        1,
        tuple(
            SequenceChunk(SequenceId(i), tuple(range(tokens)), first, (BlockId(0),), GREEDY, None)
            for i, (first, tokens) in enumerate(chunks)
        ),
    )


def a_scored_prompt(tokens: int) -> StepPlan:
    return StepPlan(
        1,
        (
            SequenceChunk(
                SequenceId(1),
                tuple(range(tokens)),
                0,
                (BlockId(0),),
                GREEDY,
                0,
                scored_token_ids=tuple(range(1, tokens)),
            ),
        ),
    )


def a_decode(sequences: int, context: int = 100) -> StepPlan:
    return a_plan(*[(context, 1)] * sequences)


def took_ms(plan: StepPlan) -> float:
    return 20 + 1.5 * plan.num_tokens + 0.0004 * plan.num_attended_tokens + 3 * plan.num_scored_tokens


def test_a_large_models_first_step_on_a_cpu_is_thought_to_take_its_share_of_seconds() -> None:
    # Llama 3.1 8B: its first token takes a CPU of a few cores 0.4 s and more.
    eight_b = DecoderConfig(32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5)
    assert StepTimeModel(on_a_cpu(eight_b.num_weights)).predict_ms(a_plan((0, 1))) > 1500
    smollm2 = DecoderConfig(30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5)
    assert on_a_cpu(smollm2.num_weights) == on_a_cpu(1000) == INITIAL


def test_attended_tokens_are_the_pairs_under_the_causal_triangle() -> None:
    assert a_plan((0, 4)).num_attended_tokens == 1 + 2 + 3 + 4
    assert a_plan((10, 2), (5, 1)).num_attended_tokens == 11 + 12 + 6


def test_predictions_come_close_once_steps_were_seen() -> None:
    model = StepTimeModel()
    seen = [a_decode(1), a_decode(8), a_plan((0, 512)), a_plan((512, 512)), a_decode(4, context=2000)] * 40
    for plan in seen:
        model.observe(plan, took_ms(plan))
    for plan in (a_decode(3), a_plan((256, 128)), a_plan((100, 1), (0, 300))):
        assert model.predict_ms(plan) == pytest.approx(took_ms(plan), rel=0.1)


def test_many_equal_decodes_do_not_make_it_forget_what_prefill_costs() -> None:
    model = StepTimeModel()
    for _ in range(10_000):
        model.observe(a_decode(1), took_ms(a_decode(1)))
    prefill = a_plan((0, 512))
    assert took_ms(prefill) / 3 < model.predict_ms(prefill) < took_ms(prefill) * 3


def test_scoring_a_prompt_is_known_to_take_its_time() -> None:
    model = StepTimeModel()
    for plan in [a_decode(1), a_decode(8), a_plan((0, 128)), a_plan((0, 512)), a_scored_prompt(300)] * 100:
        model.observe(plan, took_ms(plan))
    assert model.predict_ms(a_scored_prompt(100)) == pytest.approx(took_ms(a_scored_prompt(100)), rel=0.2)

    budget_ms = took_ms(a_plan((0, 200)))
    unscored = model.tokens_within(budget_ms, StepWork(0, 0), 0, are_scored=False)
    scored = model.tokens_within(budget_ms, StepWork(0, 0), 0, are_scored=True)
    assert unscored == pytest.approx(200, rel=0.2)
    assert took_ms(a_scored_prompt(scored)) == pytest.approx(budget_ms, rel=0.2)


def test_a_machine_that_slows_down_is_noticed() -> None:
    model = StepTimeModel()
    for _ in range(500):
        model.observe(a_decode(8), 30.0)
    for _ in range(30):
        model.observe(a_decode(8), 300.0)
    assert model.predict_ms(a_decode(8)) == pytest.approx(300, rel=0.1)


def test_no_prediction_is_negative_whatever_was_seen() -> None:
    model = StepTimeModel()
    for tokens in range(1, 200):
        model.observe(a_plan((0, tokens)), 1000 / tokens)
    assert all(model.predict_ms(a_plan((0, tokens))) >= 0 for tokens in (1, 10, 512, 4096))


def test_its_coefficients_say_what_it_predicts_also_of_a_machine_that_slowed_down() -> None:
    model = StepTimeModel()
    for _ in range(500):
        model.observe(a_decode(8), 30.0)
    for _ in range(30):
        model.observe(a_decode(8), 300.0)
    plan = a_decode(5)
    fixed_ms, per_token, per_attended, _ = model.coefficients
    told_ms = fixed_ms + per_token * plan.num_tokens + per_attended * plan.num_attended_tokens
    assert told_ms == pytest.approx(model.predict_ms(plan))


def test_a_step_with_a_prompt_takes_as_long_as_its_launch_and_computes_meanwhile_what_it_can() -> None:
    model = StepTimeModel(StepTimeCoefficients(fixed_ms=4.0, ms_per_token=0.02, ms_per_attended_token=0.0))
    small = a_plan((100, 1), (0, 50))
    for _ in range(50):
        model.observe(small, took_ms=15.0, launch_ms=14.9)
    assert model.coefficients == StepTimeCoefficients(4.0, 0.02, 0.0), "nothing is learned of the device"
    assert model.predict_ms(small) == pytest.approx(14.9)
    assert model.predict_ms(a_decode(1)) == pytest.approx(4.02)
    work = StepWork.of(a_decode(1).chunks)
    assert model.tokens_within(12.0, work, 0, are_scored=False) == pytest.approx((14.9 - 4.02) / 0.02, abs=1)


def test_a_step_that_takes_longer_than_its_launch_is_learned_from() -> None:
    model = StepTimeModel(StepTimeCoefficients(fixed_ms=4.0, ms_per_token=0.02, ms_per_attended_token=0.0))
    large = a_plan((0, 2000))
    for _ in range(50):
        model.observe(large, took_ms=60.0, launch_ms=15.0)
    assert model.predict_ms(large) == pytest.approx(60.0, rel=0.05)


def test_a_launch_that_waited_for_the_device_is_forgotten_soon() -> None:
    """The first use of a library's kernel loads it, and that waits until the device has done all it was given."""
    model = StepTimeModel(StepTimeCoefficients(fixed_ms=4.0, ms_per_token=0.02, ms_per_attended_token=0.0))
    large = a_plan((0, 2000))
    model.observe(large, took_ms=500.0, launch_ms=500.0)
    for _ in range(8):
        model.observe(large, took_ms=60.0, launch_ms=15.0)
    assert model.launch_ms == pytest.approx(15.0, abs=2.0)
    model.observe(large, took_ms=500.0, launch_ms=500.0)
    assert model.launch_ms < 1.2 * 15.0 + 2.0


# Steps with prompts that are filled up

FILLED = StepTimeCoefficients(fixed_ms=4.0, ms_per_token=0.02, ms_per_attended_token=0.0)


def test_a_step_with_a_prompt_takes_what_it_is_filled_up_to_takes() -> None:
    model = StepTimeModel(FILLED, (64, 128))
    assert model.predict_ms(a_plan((100, 1), (0, 69))) == pytest.approx(4 + 0.02 * 128)
    assert model.predict_ms(a_plan((0, 200))) == pytest.approx(4 + 0.02 * 200), "none is so large"
    assert model.predict_ms(a_decode(3)) == pytest.approx(4 + 0.02 * 3), "decodes have sizes of their own"


def test_what_steps_took_is_learned_of_the_rows_that_they_were_filled_up_to() -> None:
    model = StepTimeModel(FILLED, (64, 128, 256))
    for tokens in [60, 65, 129, 100, 256, 140] * 50:
        filled = min(size for size in (64, 128, 256) if size >= tokens)
        model.observe(a_plan((0, tokens)), 5 + 0.03 * filled)
    assert model.predict_ms(a_plan((0, 66))) == pytest.approx(5 + 0.03 * 128, rel=0.02)


@pytest.mark.parametrize(
    ("budget_ms", "decodes", "prefill", "within"),
    [
        (4 + 0.02 * 200, 10, 0, 118),  # 190 would fit: 128 rows are filled, the other 62 would cost 128.
        (4 + 0.02 * 128.5, 10, 0, 118),
        (4 + 0.02 * 50, 10, 0, 54),  # 40 would fit, and cost as much as these.
        (4 + 0.02 * 300.5, 10, 0, 290),  # More than the largest size.
        (4 + 0.02 * 200, 10, 100, 18),  # A second prompt fills up what the first one left.
        (4 + 0.02 * 90, 10, 90, 28),  # Also when there is no time left: those rows are computed in any case.
        (3.0, 10, 0, 0),
    ],
)
def test_prompts_are_cut_so_that_a_step_is_full(budget_ms: float, decodes: int, prefill: int, within: int) -> None:
    model = StepTimeModel(FILLED, (64, 128, 256))
    work = StepWork(decodes + prefill, 0, num_prefill_tokens=prefill)
    assert model.tokens_within(budget_ms, work, 0, are_scored=False) == within


def curved_ms(size: int) -> float:
    """Few rows cost what reading the weights takes, many what multiplying does."""
    return max(5.0, 0.5 + 0.0227 * size)


def test_a_budget_is_used_up_though_time_is_no_straight_line_of_the_rows() -> None:
    sizes = tuple(range(32, 2049, 32))
    model = StepTimeModel(FILLED, sizes)
    for size in (2048, 1024, 512, 256, 128):
        model.observe(a_plan((0, size)), curved_ms(size))
    for _ in range(50):
        model.observe(a_decode(8), 4.2)
        tokens = model.tokens_within(12.0, StepWork.of(a_decode(8).chunks), 0, are_scored=False)
        plan = a_plan(*[(100, 1)] * 8, (0, tokens))
        model.observe(plan, curved_ms(plan.num_tokens))
    assert plan.num_tokens == 480, "512 rows take 12.1 ms"
    assert model.predict_ms(a_decode(8)) == pytest.approx(4.2, rel=0.03)
    assert model.predict_ms(a_plan((0, 384))) == pytest.approx(curved_ms(384), rel=0.1), "between 256 and 512"


def test_what_changes_for_steps_of_one_size_is_expected_of_the_others_too() -> None:
    model = StepTimeModel(FILLED, (64, 128, 256))
    for size in (64, 128, 256) * 30:
        model.observe(a_plan((0, size)), curved_ms(size))
    for _ in range(60):
        model.observe(a_plan((0, 128)), 1.5 * curved_ms(128))
    assert model.predict_ms(a_plan((0, 256))) > 1.2 * curved_ms(256)
