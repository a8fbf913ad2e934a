"""Spans, sent to an OpenTelemetry receiver. The only module that imports OpenTelemetry; `tracing` imports it."""

from threading import Timer

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as ApiSpan

from services.common.telemetry.conventions import ERROR_TYPE
from services.common.telemetry.trace_context import is_sampled, span_id_of, trace_id_of
from services.common.telemetry.tracing import Attributes, Side, Span

QUEUED_SPANS = 8_192
"""Most that wait to be sent; more are dropped."""
BATCH_SPANS = 256
"""A batch is written with the interpreter's lock held: this many take some ms."""
BATCH_DELAY_MS = 1_000
SEND_LIMIT_S = 2.0
"""Longest that one batch is tried to be sent."""
CLOSE_LIMIT_S = 3.0
"""Longest that a process waits at its end for all that was not sent yet; the rest is lost."""

_KINDS = {Side.SERVER: SpanKind.SERVER, Side.CLIENT: SpanKind.CLIENT, Side.INTERNAL: SpanKind.INTERNAL}


class OtlpTracer:
    """Records what the trace's beginning asked to be recorded, and every trace that begins here."""

    enabled = True

    def __init__(self, endpoint: str, service: str) -> None:
        self._exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=SEND_LIMIT_S
        )
        resource = Resource.create({"service.name": f"shoal-{service}", "service.namespace": "shoal"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=QUEUED_SPANS,
                schedule_delay_millis=BATCH_DELAY_MS,
                max_export_batch_size=BATCH_SPANS,
            )
        )
        self._tracer = self._provider.get_tracer("shoal")

    def begin(
        self, name: str, parent: str, attributes: Attributes | None = None, *, side: Side = Side.INTERNAL,
        at_ns: int | None = None,
    ) -> Span:  # fmt: skip
        """Begin a span under its parent, wherever that is."""
        span = self._tracer.start_span(
            name, context=_context(parent), kind=_KINDS[side], attributes=attributes, start_time=at_ns
        )
        return _OtlpSpan(span)

    def close(self) -> None:
        """Send what waits, within CLOSE_LIMIT_S."""
        # The provider's own end has no limit of its own: it tries batch after batch while the receiver is away.
        giving_up = Timer(CLOSE_LIMIT_S, self._exporter.shutdown)
        giving_up.start()
        self._provider.shutdown()
        giving_up.cancel()


class _OtlpSpan:
    __slots__ = ("_span", "traceparent")

    def __init__(self, span: ApiSpan) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(self, attributes: Attributes | None = None, *, error: str = "", at_ns: int | None = None) -> None:
        """End it."""
        if attributes:
            self._span.set_attributes(attributes)
        if error:
            self._span.set_attribute(ERROR_TYPE, error)
            self._span.set_status(StatusCode.ERROR, error)
        if isinstance(self._span, SdkSpan) and at_ns is not None and self._span.start_time is not None:
            # Clocks of two processes: a phase takes no less than nothing.
            at_ns = max(at_ns, self._span.start_time)
        self._span.end(at_ns)


def _context(parent: str) -> Context:
    # An empty one, not None: nothing of this process is a parent by accident.
    if not parent:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if is_sampled(parent) else TraceFlags.DEFAULT)
    there = SpanContext(int(trace_id_of(parent), 16), int(span_id_of(parent), 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(there), Context())
