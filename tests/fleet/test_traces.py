"""A request is one trace, from client to engine, also when its worker dies; and no line of a log tells a prompt."""

import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from tests.fleet.conftest import Fleet
from tests.fleet.trace_receiver import ReceivedSpan, TraceReceiver, trace_receiver

SECRET = "the colour of my bicycle is heliotrope"
PHASES = {
    "text_completion smollm2-135m-instruct": "gateway",
    "encode": "gateway",
    "tokenize": "tokenizer",
    "intake": "gateway",
    "queue": "scheduler",
    "placement": "scheduler",
    "attempt": "worker",
    "prefill": "worker",
    "decode": "worker",
    "finish": "worker",
}
INSIDE = {
    "encode": "text_completion smollm2-135m-instruct", "intake": "text_completion smollm2-135m-instruct",
    "tokenize": "encode", "queue": "text_completion smollm2-135m-instruct",
    "placement": "text_completion smollm2-135m-instruct", "attempt": "text_completion smollm2-135m-instruct",
    "prefill": "attempt", "decode": "attempt", "finish": "attempt",
}  # fmt: skip
MOST_BYTES = 150_000_000


@pytest.fixture(scope="module")
def receiver() -> Iterator[TraceReceiver]:
    with trace_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def fleet(receiver: TraceReceiver, start: Callable[..., Fleet]) -> Iterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_OTLP_ENDPOINT", receiver.endpoint)
        yield start("--workers", "2")


def a_traceparent() -> str:
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def names(spans: list[ReceivedSpan]) -> list[str]:
    return sorted(span.name for span in spans)


def test_a_request_is_one_trace_with_one_span_a_phase(fleet: Fleet, receiver: TraceReceiver) -> None:
    traceparent = a_traceparent()
    with fleet.client() as client:
        stream = client.generate(SECRET, max_tokens=20, temperature=0, ignore_eos=True, traceparent=traceparent)
        stream.read()
    spans = receiver.trace(traceparent[3:35], lambda spans: names(spans) == sorted(PHASES))
    by_name = {span.name: span for span in spans}
    assert {span.name: span.service for span in spans} == PHASES
    root = by_name["text_completion smollm2-135m-instruct"]
    assert root.parent_id == traceparent[36:52], "the client's span is above it"
    for name, parent in INSIDE.items():
        assert by_name[name].parent_id == by_name[parent].span_id, name
    assert all(span.start_ns <= span.end_ns and not span.failed for span in spans)
    order = ["encode", "intake", "placement", "prefill", "decode", "finish"]
    starts = [by_name[name].start_ns for name in order]
    assert starts == sorted(starts)
    assert by_name["prefill"].end_ns == by_name["decode"].start_ns


def test_the_gateways_span_follows_the_genai_conventions(fleet: Fleet, receiver: TraceReceiver) -> None:
    traceparent = a_traceparent()
    with fleet.client() as client:
        stream = client.generate(
            messages=[{"role": "user", "content": SECRET}], max_tokens=3, temperature=0.5, top_k=4, ignore_eos=True,
            traceparent=traceparent,
        )  # fmt: skip
        stream.read()
    name = "chat smollm2-135m-instruct"
    (span,) = [s for s in receiver.trace(traceparent[3:35], lambda all: name in names(all)) if s.name == name]
    first_chunk_s = span.attributes.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < first_chunk_s < (span.end_ns - span.start_ns) / 1e9
    assert stream.finished is not None
    assert span.kind == "server"
    assert span.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "shoal",
        "gen_ai.request.model": "smollm2-135m-instruct",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 4,
        "gen_ai.response.id": stream.request_id,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": stream.finished.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": stream.finished.usage.cached_tokens,
    }


def test_a_trace_goes_on_over_its_workers_death(fleet: Fleet, receiver: TraceReceiver) -> None:
    traceparent = a_traceparent()
    with fleet.client() as client:
        stream = client.generate(SECRET, max_tokens=60, temperature=0, ignore_eos=True, traceparent=traceparent)
        next(stream)
        worker = client.get_request(stream.request_id).decisions[1].detail
        os.kill(_front_of(fleet, worker), signal.SIGKILL)
        stream.read()
    assert len(stream.token_ids) == 60
    spans = receiver.trace(traceparent[3:35], lambda spans: "finish" in names(spans) and _has_root(spans))
    # More than one, if the machine was so busy that the second worker was taken for lost as well.
    requeues = [span for span in spans if span.name == "requeue"]
    first = requeues[0]
    assert all(requeue.failed for requeue in requeues)
    assert (first.attributes["shoal.attempt.number"], first.attributes["shoal.worker.id"]) == (1, worker)
    # What the first attempt had noted died with its worker; what others decided about it is there.
    placements = [span.attributes["shoal.attempt.number"] for span in spans if span.name == "placement"]
    assert placements == list(range(1, len(requeues) + 2))
    attempts = [span for span in spans if span.name == "attempt"]
    assert all(attempt.attributes["shoal.worker.id"] != worker for attempt in attempts)
    (ended,) = [attempt for attempt in attempts if not attempt.failed]
    assert ended.attributes["shoal.attempt.number"] == placements[-1]


def test_a_refused_call_is_a_failed_span(fleet: Fleet, receiver: TraceReceiver) -> None:
    traceparent = a_traceparent()
    with fleet.client() as client, pytest.raises(shoal.InvalidRequest):
        client.generate("x", max_tokens=1_000_000, traceparent=traceparent).read()
    (span,) = [s for s in receiver.trace(traceparent[3:35], _has_root) if s.name.startswith("text_completion")]
    assert span.failed
    assert span.attributes["error.type"]


def test_a_client_that_wants_no_trace_gets_none(fleet: Fleet, receiver: TraceReceiver) -> None:
    unsampled = a_traceparent()[:-2] + "00"
    with fleet.client() as client:
        client.generate(SECRET, max_tokens=2, traceparent=unsampled).read()
        asked = a_traceparent()
        client.generate(SECRET, max_tokens=2, traceparent=asked).read()
    receiver.trace(asked[3:35], lambda spans: "finish" in names(spans) and _has_root(spans))
    assert unsampled[3:35] not in {span.trace_id for span in receiver.all()}


def test_every_line_about_a_request_names_its_trace_and_none_its_prompt(fleet: Fleet) -> None:
    traceparent = a_traceparent()
    with fleet.client() as client:
        stream = client.generate(SECRET, max_tokens=4, traceparent=traceparent)
        stream.read()
    logs = [path.read_text(errors="replace") for path in Path(fleet.state_dir / "log").glob("*.log")]
    assert not any("heliotrope" in log for log in logs)
    lines = [json.loads(line) for log in logs for line in log.splitlines() if line.startswith("{")]
    ours = [line for line in lines if line.get("request") == f"default/{stream.request_id}"]
    assert {line["message"] for line in ours} >= {"accepted", "placed", "started", "ended"}
    assert {line["service"] for line in ours} == {"gateway", "scheduler", "worker"}
    assert {line["trace_id"] for line in ours} == {traceparent[3:35]}
    assert all(line.get("trace_id") for line in lines if "request" in line)


def test_no_span_tells_a_prompt(receiver: TraceReceiver) -> None:
    assert receiver.all()
    assert not any("heliotrope" in str(span) for span in receiver.all())


@pytest.mark.parametrize("kind", ["gateway", "tokenizer", "scheduler"])
def test_tracing_keeps_a_service_small(fleet: Fleet, kind: str) -> None:
    (process,) = fleet.of_kind(kind)
    assert psutil.Process(process.pid).memory_info().rss < MOST_BYTES


def _has_root(spans: list[ReceivedSpan]) -> bool:
    return any(span.service == "gateway" and span.kind == "server" for span in spans)


def _front_of(fleet: Fleet, worker: str) -> int:
    """The process whose log says that it serves under this id."""
    for process in fleet.of_kind("worker"):
        lines: list[dict[str, Any]] = [
            json.loads(line) for line in Path(process.log).read_text().splitlines() if '"serving"' in line
        ]
        if lines and lines[-1]["worker"] == worker:
            return process.pid
    raise AssertionError(f"no worker {worker}")
