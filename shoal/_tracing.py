"""The trace that a call belongs to: the caller's word, or what OpenTelemetry says in this program."""

import sys

Metadata = tuple[tuple[str, str], ...] | None
TRACEPARENT_KEY = "traceparent"


def trace_metadata(traceparent: str | None) -> Metadata:
    """Metadata that carries a W3C traceparent; None if there is no trace.

    `traceparent`: None: that of the current span, in a program that has imported OpenTelemetry itself; it is not
    imported here.
    """
    found = _current() if traceparent is None else traceparent
    return ((TRACEPARENT_KEY, found),) if found else None


def _current() -> str:
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
