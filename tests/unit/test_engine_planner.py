"""What a step holds: every decode, then prefill chunks, short prompts first."""

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.sequence import SequenceId
from tests.unit.engine_builders import STOP_TOKEN, Engine, add, limits_of


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=19, max_tokens=3), now_ms=0)
    assert engine.steps() == [[(1, 8)], [(1, 8)], [(1, 3)], [(1, 1)], [(1, 1)]]
    assert engine.tokens(1) == [19, 20, 21]
    assert engine.ends() == {1: engine_pb2.SEQUENCE_END_LENGTH}


def test_decodes_go_on_while_another_prompt_is_prefilled() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=4, max_tokens=10), now_ms=0)
    engine.step()
    engine.planner.add(add(2, prompt=12, max_tokens=2), now_ms=0)
    assert engine.steps()[:3] == [[(1, 1), (2, 8)], [(1, 1), (2, 4)], [(1, 1), (2, 1)]]


def test_prompts_share_a_steps_prefill_tokens_in_order_of_arrival() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    for sequence_id in (1, 2, 3):
        engine.planner.add(add(sequence_id, prompt=5, max_tokens=1), now_ms=0)
    assert engine.steps() == [[(1, 5), (2, 3)], [(2, 2), (3, 5)]]


def test_a_short_prompt_goes_before_a_long_one_that_has_begun() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=24, max_tokens=1), now_ms=0)
    engine.step()
    engine.planner.add(add(2, prompt=4, max_tokens=1), now_ms=0)
    assert engine.steps() == [[(2, 4), (1, 4)], [(1, 8)], [(1, 4)]]


def test_a_long_prompt_is_overtaken_by_four_times_its_tokens_at_most() -> None:
    engine = Engine(limits_of(64, 4, max_prefill_tokens_per_step=4))
    engine.planner.add(add(1, prompt=20, max_tokens=1), now_ms=0)
    num_before = 0
    for sequence_id in range(2, 50):
        engine.planner.add(add(sequence_id, prompt=4, max_tokens=1), now_ms=0)
        plan = engine.step()
        assert plan is not None
        if plan.chunks[0].sequence_id == 1:
            break
        num_before += 4
    assert num_before == 4 * 20 - 16, "less by four times what the others are long"


def test_no_step_holds_more_sequences_than_allowed() -> None:
    engine = Engine(limits_of(max_sequences=2, max_prefill_tokens_per_step=64))
    for sequence_id in (1, 2, 3):
        engine.planner.add(add(sequence_id, prompt=2, max_tokens=2), now_ms=0)
    assert engine.steps() == [[(1, 2), (2, 2)], [(1, 1), (2, 1)], [(3, 2)], [(3, 1)]]


def test_the_first_that_waits_for_blocks_is_not_overtaken_by_those_behind_it() -> None:
    engine = Engine(limits_of(num_blocks=4, block_size_tokens=4, max_prefill_tokens_per_step=64))
    engine.planner.add(add(1, prompt=4, max_tokens=4), now_ms=0)
    engine.planner.add(add(2, prompt=8, max_tokens=8), now_ms=0)
    engine.planner.add(add(3, prompt=8, max_tokens=1), now_ms=0)
    order = list(dict.fromkeys(sequence for step in engine.steps() for sequence, _ in step))
    assert order == [1, 2, 3]


def test_a_stop_token_ends_a_sequence_and_is_among_its_tokens() -> None:
    engine = Engine()
    engine.runner.next_token = lambda context: STOP_TOKEN if len(context) == 7 else 50
    engine.planner.add(add(1, prompt=5, max_tokens=10), now_ms=0)
    engine.steps()
    assert engine.tokens(1) == [50, 50, STOP_TOKEN]
    assert engine.ends() == {1: engine_pb2.SEQUENCE_END_STOP_TOKEN}


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    engine = Engine()
    engine.planner.add(add(1, prompt=[7, STOP_TOKEN], max_tokens=1), now_ms=0)
    engine.steps()
    assert engine.ends() == {1: engine_pb2.SEQUENCE_END_LENGTH}


def test_an_ended_sequence_leaves_all_its_blocks() -> None:
    engine = Engine()
    engine.planner.add(add(1, prompt=9, max_tokens=5), now_ms=0)
    engine.step()
    assert engine.planner.num_free_blocks == engine.limits.num_blocks - 3
    engine.steps()
    assert engine.planner.num_free_blocks == engine.limits.num_blocks


def test_known_tokens_are_computed_as_prompt_and_counted() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=64))
    engine.planner.add(add(1, prompt=5, max_tokens=4, known=[50, 51]), now_ms=0)
    plan = engine.step()
    assert plan is not None
    assert plan.chunks[0].token_ids == (100, 101, 102, 103, 104, 50, 51)
    assert plan.chunks[0].sample_index == 2
    engine.steps()
    assert engine.tokens(1) == [7, 8]
    assert engine.ends() == {1: engine_pb2.SEQUENCE_END_LENGTH}


@pytest.mark.parametrize(
    ("known", "end"),
    [
        ([50, 51, 52, 53], engine_pb2.SEQUENCE_END_LENGTH),
        ([50, STOP_TOKEN], engine_pb2.SEQUENCE_END_STOP_TOKEN),
    ],
)
def test_known_tokens_that_are_the_whole_answer_end_it_at_once(
    known: list[int], end: engine_pb2.SequenceEnd.ValueType
) -> None:
    engine = Engine()
    engine.planner.add(add(1, max_tokens=4, known=known), now_ms=0)
    assert engine.step() is None
    assert engine.ends() == {1: end}
    assert engine.tokens(1) == []


def test_a_held_sequence_is_prefilled_but_for_its_last_token_and_samples_when_released() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=10, max_tokens=2, held=True), now_ms=0)
    assert engine.steps() == [[(1, 8)], [(1, 1)]]
    assert engine.planner.waiting_prefill_tokens == 0
    engine.planner.release(SequenceId(1), [])
    assert engine.steps() == [[(1, 1)], [(1, 1)]]
    assert engine.tokens(1) == [10, 11]


def test_tokens_forced_at_release_are_computed_before_anything_is_sampled() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=4, max_tokens=5, known=[50], held=True), now_ms=0)
    engine.steps()
    engine.planner.release(SequenceId(1), [51, 52])
    plan = engine.step()
    assert plan is not None
    assert plan.chunks[0].token_ids == (50, 51, 52)
    assert plan.chunks[0].sample_index == 3
    engine.steps()
    assert engine.tokens(1) == [7, 8]


@pytest.mark.parametrize(
    ("forced", "end"),
    [
        ([60, 61], engine_pb2.SEQUENCE_END_LENGTH),
        ([60, 61, 62, 63, 64, 65, 66, 67, 68, 69], engine_pb2.SEQUENCE_END_LENGTH),
        ([STOP_TOKEN], engine_pb2.SEQUENCE_END_STOP_TOKEN),
    ],
)
def test_forced_tokens_that_complete_the_answer_end_it_at_once(
    forced: list[int], end: engine_pb2.SequenceEnd.ValueType
) -> None:
    engine = Engine()
    engine.planner.add(add(1, max_tokens=3, known=[50], held=True), now_ms=0)
    engine.steps()
    engine.planner.release(SequenceId(1), forced)
    assert engine.step() is None
    assert engine.ends() == {1: end}
    assert engine.planner.num_free_blocks == engine.limits.num_blocks


def test_a_held_sequence_released_before_its_prefill_is_done_goes_on_as_usual() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=12, max_tokens=2, held=True), now_ms=0)
    engine.step()
    engine.planner.release(SequenceId(1), [])
    assert engine.steps() == [[(1, 4)], [(1, 1)]]


def test_an_aborted_sequence_leaves_its_blocks_before_the_next_step() -> None:
    engine = Engine()
    engine.planner.add(add(1, prompt=9, max_tokens=5), now_ms=0)
    engine.step()
    engine.planner.abort(SequenceId(1))
    assert engine.planner.num_free_blocks == engine.limits.num_blocks
    assert engine.step() is None
    assert engine.ends() == {}


def test_words_about_unknown_sequences_are_ignored() -> None:
    engine = Engine()
    engine.planner.abort(SequenceId(7))
    engine.planner.release(SequenceId(7), [1, 2])
    assert engine.step() is None


def test_a_release_of_what_is_not_held_changes_nothing() -> None:
    engine = Engine()
    engine.planner.add(add(1, max_tokens=2), now_ms=0)
    engine.planner.release(SequenceId(1), [50])
    engine.steps()
    assert engine.tokens(1) == [5, 6]


def test_an_expired_sequence_is_in_no_further_step() -> None:
    engine = Engine()
    engine.planner.add(add(1, max_tokens=9, remaining_ms=100), now_ms=1000)
    engine.planner.add(add(2, max_tokens=2), now_ms=1000)
    engine.planner.expire(now_ms=1099)
    engine.step()
    engine.planner.expire(now_ms=1100)
    assert {sequence for step in engine.steps() for sequence, _ in step} == {2}
    assert engine.ends()[1] == engine_pb2.SEQUENCE_END_EXPIRED
    assert engine.planner.num_free_blocks == engine.limits.num_blocks


def test_a_suspect_has_its_steps_for_itself_until_it_is_past_the_point_of_suspicion() -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=4, max_tokens=6), now_ms=0)
    engine.step()
    engine.planner.add(add(2, prompt=10, max_tokens=3, alone_until_tokens=2), now_ms=0)
    engine.planner.add(add(3, prompt=10, max_tokens=1), now_ms=0)
    assert engine.steps()[:5] == [[(1, 1)], [(2, 8)], [(2, 2)], [(2, 1)], [(1, 1), (2, 1), (3, 8)]]


def test_a_suspect_starts_at_once_when_nothing_else_is_there() -> None:
    engine = Engine()
    engine.planner.add(add(1, prompt=4, max_tokens=2, alone_until_tokens=2), now_ms=0)
    engine.planner.add(add(2, prompt=4, max_tokens=1, alone_until_tokens=1), now_ms=0)
    assert engine.steps() == [[(1, 4)], [(1, 1)], [(2, 4)]]


def test_a_held_suspect_does_not_keep_others_from_their_steps() -> None:
    engine = Engine()
    engine.planner.add(add(1, prompt=4, max_tokens=2, alone_until_tokens=1, held=True), now_ms=0)
    engine.planner.add(add(2, prompt=4, max_tokens=2), now_ms=0)
    assert engine.steps() == [[(1, 3)], [(2, 4)], [(2, 1)]]


@pytest.mark.parametrize(
    ("sequence", "error"),
    [
        (add(1, prompt=60, max_tokens=5), "60 prompt tokens and max_tokens 5 exceed the context of 64 tokens"),
        (add(1, prompt=30, max_tokens=3), "33 tokens need 9 blocks; the KV cache has 8"),
        (add(1, prompt=0), "the prompt has no tokens"),
        (add(1, prompt=[1, 1000]), "token id 1000 is not in the vocabulary of 1000"),
    ],
)
def test_what_never_fits_fails_with_the_reason(sequence: engine_pb2.AddSequence, error: str) -> None:
    engine = Engine(limits_of(num_blocks=8, block_size_tokens=4, context_tokens=64))
    engine.planner.add(sequence, now_ms=0)
    assert engine.step() is None
    assert [(output.end, output.error) for output in engine.outputs] == [(engine_pb2.SEQUENCE_END_FAILED, error)]


def test_what_is_not_supported_fails_by_name_instead_of_being_ignored() -> None:
    engine = Engine()
    sequence = add(1)
    sequence.payload.response_format.json_object = True
    engine.planner.add(sequence, now_ms=0)
    engine.step()
    assert engine.outputs[0].error == "this engine does not support response_format"


def test_a_bias_for_a_token_that_there_is_not_fails_with_the_reason() -> None:
    engine = Engine()
    sequence = add(1)
    sequence.payload.sampling.logit_bias[1000] = 1.0
    engine.planner.add(sequence, now_ms=0)
    engine.step()
    assert engine.outputs[0].error == "token id 1000 is not in the vocabulary of 1000"


def given_logprobs(engine: Engine) -> dict[int, float]:
    """Log-probabilities of given tokens, by position; of the pretended runner: minus the token."""
    return {
        position: told.logprob
        for output in engine.outputs
        for position, told in enumerate(output.given_logprobs, output.given_from)
    }


@pytest.mark.parametrize("chunk_tokens", [2, 8])
def test_known_tokens_that_are_the_whole_answer_end_it_once_their_log_probabilities_are_told(chunk_tokens: int) -> None:
    engine = Engine(limits_of(max_prefill_tokens_per_step=chunk_tokens))
    engine.planner.add(add(1, prompt=3, max_tokens=4, known=[7, 8, 9, 6], logprobs=0), now_ms=0)
    engine.steps()
    assert given_logprobs(engine) == {3: -7, 4: -8, 5: -9, 6: -6}
    assert (engine.tokens(1), engine.ends()) == ([], {1: engine_pb2.SEQUENCE_END_LENGTH})
    assert engine.planner.num_free_blocks == engine.limits.num_blocks


def test_forced_tokens_that_complete_the_answer_have_their_log_probabilities_told_too() -> None:
    engine = Engine()
    engine.planner.add(add(1, prompt=3, max_tokens=4, known=[7], held=True, logprobs=0), now_ms=0)
    engine.steps()
    assert given_logprobs(engine) == {3: -7}
    engine.planner.release(SequenceId(1), [8, STOP_TOKEN])
    engine.steps()
    assert given_logprobs(engine) == {3: -7, 4: -8, 5: -STOP_TOKEN}
    assert (engine.tokens(1), engine.ends()) == ([], {1: engine_pb2.SEQUENCE_END_STOP_TOKEN})


def test_tokens_left_to_prefill_are_counted_over_all_sequences() -> None:
    engine = Engine(limits_of(max_sequences=1, max_prefill_tokens_per_step=8))
    engine.planner.add(add(1, prompt=10, max_tokens=3), now_ms=0)
    engine.planner.add(add(2, prompt=12, max_tokens=3), now_ms=0)
    engine.step()
    assert engine.planner.waiting_prefill_tokens == 2 + 12
    engine.step()
    assert engine.planner.waiting_prefill_tokens == 12


def test_an_id_in_use_is_a_defect() -> None:
    engine = Engine()
    engine.planner.add(add(1), now_ms=0)
    with pytest.raises(ValueError, match="sequence 1 is in the engine already"):
        engine.planner.add(add(1), now_ms=0)
