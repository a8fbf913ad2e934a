"""The trace that a call belongs to: the caller's word, or what OpenTelemetry says in this program."""

import sys

from shoal._gateways import CallMetadata

TRACEPARENT_KEY = "traceparent"


def trace_metadata(traceparent: str | None) -> CallMetadata:
    """Metadata that carries a W3C traceparent; empty if there is no trace.

    `traceparent`: None: that of the current span, in a program that has imported OpenTelemetry itself; it is not
    imported here.
    """
    found = _current() if traceparent is None else traceparent
    return ((TRACEPARENT_KEY, found),) if found else ()


def _current() -> str:
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
