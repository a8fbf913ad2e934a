"""Traces cost nothing where nobody asked for them, and hold up nothing where their receiver is away."""

import subprocess
import sys

import pytest

from services.common.config import ConfigError
from services.common.telemetry.otlp import CLOSE_LIMIT_S
from services.common.telemetry.tracing import tracing
from shoal._tracing import trace_metadata
from tests.fleet.trace_receiver import trace_receiver
from tests.unit.test_telemetry_metrics import free_port

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("service", ["gateway", "tokenizer", "scheduler", "worker"])
def test_without_an_endpoint_nothing_that_sends_is_imported(service: str) -> None:
    """What is only installed may be: the client of Redis looks for the rest by itself."""
    program = f"""
import sys
import services.{service}.__main__
from services.common.telemetry.tracing import tracing
with tracing("", "{service}") as tracer:
    tracer.begin("call", "").end()
assert not [name for name in sys.modules if name.startswith("opentelemetry.exporter")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_spans_that_wait_are_sent_at_the_end() -> None:
    with trace_receiver() as receiver:
        with tracing(receiver.endpoint, "gateway") as tracer:
            call = tracer.begin("call", GIVEN)
            tracer.begin("inside", call.traceparent).end(error="LOST")
            call.end()
        inside, call_span = receiver.all()
    assert (inside.name, inside.failed, inside.parent_id) == ("inside", True, call_span.span_id)
    assert (call_span.name, call_span.failed, call_span.parent_id) == ("call", False, GIVEN[36:52])
    assert {span.trace_id for span in (inside, call_span)} == {GIVEN[3:35]}


@pytest.mark.timeout(CLOSE_LIMIT_S + 5)
def test_a_receiver_that_is_away_holds_up_nobody() -> None:
    """By itself, OpenTelemetry would try for 12 s and more."""
    with tracing(f"http://127.0.0.1:{free_port()}", "gateway") as tracer:
        for _ in range(3_000):
            tracer.begin("call", "").end()


def test_a_phase_never_ends_before_it_began() -> None:
    with trace_receiver() as receiver:
        with tracing(receiver.endpoint, "scheduler") as tracer:
            tracer.begin("queue", GIVEN, at_ns=2_000).end(at_ns=1_000)
        (span,) = receiver.all()
    assert span.end_ns == span.start_ns


def test_an_endpoint_without_opentelemetry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "services.common.telemetry.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'shoal-inference\[telemetry\]'"),
        tracing("http://x:1", "gateway"),
    ):
        pass


def test_a_client_sends_the_trace_it_is_given_or_that_of_its_program() -> None:
    from opentelemetry import context, trace

    assert trace_metadata(GIVEN) == (("traceparent", GIVEN),)
    assert trace_metadata(None) == ()
    there = trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1))
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(there)))
    try:
        assert trace_metadata(None) == (("traceparent", f"00-{0xABC:032x}-{0xDEF:016x}-01"),)
        assert trace_metadata("") == (), "an empty one: no trace"
    finally:
        context.detach(token)
