"""A token goes to its reader with its log-probability or not at all, whichever attempt sampled it (worker front)."""

import pytest

from gen.shoal.fleet.v1 import request_pb2
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.record.history import Held
from services.worker.front import gateway_links
from tests.contract.worker_front import Bench


async def outcome(bench: Bench, name: str) -> request_pb2.Outcome:
    """Of a request that has ended, or is about to."""
    record = await bench.record_until(bench.key(name), lambda record: record.ended)
    return request_pb2.Outcome.FromString(record.outcome)


async def test_tokens_go_out_with_their_log_probabilities_and_the_end_keeps_all_of_them(bench: Bench) -> None:
    _, seen = await bench.run("a", max_tokens=2, logprobs=2, prompt_logprobs=1)
    bench.engine.steps(2)
    await bench.gateway.until(lambda: seen.end is not None)
    assert seen.logprobs() == [-10, -11]
    assert [len(told.top) for delta in seen.deltas for told in delta.logprobs] == [2, 2]
    stored = await outcome(bench, "a")
    assert [told.logprob for told in stored.logprobs[0].tokens] == [-10, -11]
    assert [(told.logprob, len(told.top)) for told in stored.prompt_logprobs] == [(-2, 1), (-3, 1)]
    assert seen.end
    assert seen.end.finished.prompt_logprobs == stored.prompt_logprobs


async def test_nothing_is_told_that_was_not_asked_for(bench: Bench) -> None:
    _, seen = await bench.run("a", max_tokens=1)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.end is not None)
    stored = await outcome(bench, "a")
    assert not seen.deltas[0].logprobs
    assert not stored.logprobs
    assert not stored.prompt_logprobs


async def test_known_tokens_wait_until_the_next_engine_has_told_their_log_probabilities(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=5, logprobs=0)
    bench.engine.steps(3)
    await bench.record_until(key, lambda record: record.journal == ((10, 11, 12),))
    await bench.requeue(key)
    seen = bench.gateway.expect(key, held=(Held(1, (10,)),))
    await bench.place(key)
    await bench.engine.until(lambda: "release" in bench.engine.commands)
    await bench.record_until(key, lambda record: record.attempt.number == 2)
    assert not seen.deltas, "they are known, but not what is to be told of them"
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [11, 12, 13])
    bench.engine.step()
    await bench.gateway.until(lambda: seen.end is not None)
    assert seen.logprobs() == [-11, -12, -13, -14]
    assert [told.logprob for told in (await outcome(bench, "a")).logprobs[0].tokens] == [-10, -11, -12, -13, -14]


async def test_an_answer_that_only_lacked_its_end_is_scored_before_it_ends(bench: Bench) -> None:
    key = await bench.lose("a", max_tokens=9, stop="l", logprobs=0, prompt_logprobs=0)
    # "kl": the reader holds what completes the stop text.
    seen = bench.gateway.expect(key, held=(Held(2, (10, 11)),))
    await bench.place(key)
    await bench.engine.until(lambda: "release" in bench.engine.commands)
    assert not (await bench.record(key)).ended
    bench.engine.step()
    await bench.gateway.until(lambda: seen.end is not None)
    stored = await outcome(bench, "a")
    assert stored.reasons == [pb.FINISH_REASON_STOP]
    assert stored.usage.completion_tokens == 2, "what the engine sampled beyond the stop is none of the answer"
    assert [told.logprob for told in stored.logprobs[0].tokens] == [-10, -11]
    assert [told.logprob for told in stored.prompt_logprobs] == [-2, -3]


async def test_choices_end_each_by_itself_and_an_ended_one_is_told_of_by_the_next_attempt_too(bench: Bench) -> None:
    key, _ = await bench.run("a", max_tokens=3, n=2, logprobs=0)
    bench.engine.held.add(max(bench.engine.sequences))
    bench.engine.steps(3)
    await bench.record_until(key, lambda record: record.journal == ((10, 11, 12), ()))
    assert not (await bench.record(key)).ended
    await bench.requeue(key)
    seen = bench.gateway.expect(key, held=(Held(3, (10, 11, 12)), Held(0)), n=2)
    await bench.place(key)
    await bench.engine.until(lambda: bench.engine.commands.count("release") == 2)
    bench.engine.steps(3)
    await bench.gateway.until(lambda: seen.end is not None)
    assert seen.logprobs(1) == [-10, -11, -12]
    stored = await outcome(bench, "a")
    assert [[told.logprob for told in choice.tokens] for choice in stored.logprobs] == [[-10, -11, -12]] * 2
    assert stored.reasons == [pb.FINISH_REASON_LENGTH] * 2


async def test_a_request_cut_off_keeps_what_was_told(bench: Bench) -> None:
    key, seen = await bench.run("a", max_tokens=9, logprobs=0)
    bench.engine.step()
    await bench.gateway.until(lambda: seen.tokens == [10])
    await bench.cancel(key)
    await bench.gateway.until(lambda: seen.end is not None)
    stored = await outcome(bench, "a")
    assert stored.reasons == [pb.FINISH_REASON_CANCELLED]
    assert [told.logprob for told in stored.logprobs[0].tokens] == [-10]


async def test_a_full_message_leaves_the_other_requests_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_links, "FULL_MESSAGE_BYTES", 1)
    keys = [await bench.submit(name, max_tokens=2, logprobs=1) for name in "abc"]
    seen = [bench.gateway.expect(key) for key in keys]
    for key in keys:
        await bench.place(key)
    await bench.engine.until(lambda: len(bench.engine.sequences) == 3)
    bench.engine.steps(2)
    await bench.gateway.until(lambda: all(each.end for each in seen))
    assert [each.logprobs() for each in seen] == [[-10, -11]] * 3
    assert bench.gateway.most_frames == 1
