"""What a worker tells of its attempts: counted and traced as they went, also when its engine dies under them."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from gen.shoal.fleet.v1 import engine_pb2
from services.common.record.states import RequestState
from services.common.telemetry.tracing import tracing
from tests.contract.worker_front import Bench, served
from tests.fleet.trace_receiver import ReceivedSpan, TraceReceiver, trace_receiver

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def receiver() -> Iterator[TraceReceiver]:
    with trace_receiver() as receiver:
        yield receiver


@pytest.fixture
async def bench(redis: Redis, pool: str, receiver: TraceReceiver) -> AsyncIterator[Bench]:
    with tracing(receiver.endpoint, "worker") as tracer:
        async with served(Bench(redis, pool, tracer)) as bench:
            yield bench


async def spans(receiver: TraceReceiver, *names: str) -> dict[str, ReceivedSpan]:
    """The spans of the trace, once there are so many of these names."""
    wanted = sorted(names)
    found = await asyncio.to_thread(
        receiver.trace, TRACEPARENT[3:35], lambda spans: sorted(span.name for span in spans) == wanted
    )
    return {span.name: span for span in found}


async def test_a_requests_tokens_steps_and_gaps_are_counted(bench: Bench, receiver: TraceReceiver) -> None:
    key, _ = await bench.run("a", max_tokens=4, traceparent=TRACEPARENT)
    bench.engine.steps(4)
    await bench.record_until(key, lambda record: record.state == RequestState.FINISHED)
    found = await spans(receiver, "attempt", "prefill", "decode", "finish")
    assert {span.parent_id for span in found.values()} == {TRACEPARENT[36:52], found["attempt"].span_id}
    assert found["decode"].attributes == {"gen_ai.usage.output_tokens": 4}
    assert found["finish"].attributes == {"shoal.request.state": "finished"}
    assert bench.figure("shoal_generation_tokens_total") == 4
    assert bench.figure("shoal_inter_token_latency_seconds_count") == 3
    assert bench.figure("shoal_request_queue_time_seconds_count") == 1
    assert bench.figure("shoal_requests_ended_total", state="finished") == 1
    assert bench.figure("shoal_prompt_tokens_total") == 3


async def test_an_attempt_whose_engine_died_is_given_back_and_told_as_failed(
    bench: Bench, receiver: TraceReceiver
) -> None:
    await bench.run("a", max_tokens=50, traceparent=TRACEPARENT)
    bench.engine.step()
    bench.engine.die()
    with pytest.raises(ExceptionGroup):
        await bench.ended
    found = await spans(receiver, "attempt", "prefill", "decode")
    assert found["attempt"].failed
    assert found["attempt"].attributes["error.type"] == "engine_died"
    assert bench.figure("shoal_requeues_total", reason="engine_died") == 1
    assert bench.figure("shoal_engine_deaths_total") == 1


async def test_preemptions_and_room_are_the_engines_word(bench: Bench) -> None:
    bench.metrics.engine_is(engine_pb2.EngineReady(num_blocks=64))
    assert bench.figure("shoal_kv_cache_usage_ratio") == 0
    for preemptions in (2, 2, 5):
        done = engine_pb2.StepDone(free_blocks=16, preemptions=preemptions, running_sequences=3, waiting_sequences=1)
        bench.metrics.step_done(done, 3, [])
    assert bench.figure("shoal_kv_cache_usage_ratio") == 0.75
    assert bench.figure("shoal_preemptions_total") == 5
    assert (bench.figure("shoal_running_sequences"), bench.figure("shoal_waiting_sequences")) == (3, 1)
    bench.metrics.engine_is(None)
    assert (bench.figure("shoal_kv_cache_usage_ratio"), bench.figure("shoal_running_sequences")) == (0, 0)
