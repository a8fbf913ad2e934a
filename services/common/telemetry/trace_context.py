"""The trace that a request belongs to, as W3C's `traceparent` says it: `00-<trace id>-<span id>-<flags>`.

Every request has one, also where nothing is exported: log lines name its trace id. https://www.w3.org/TR/trace-context/
"""

import re
import secrets

TRACEPARENT_KEY = "traceparent"
"""Key of the metadata or header."""
_PATTERN = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_SAMPLED = 1


def is_traceparent(text: str) -> bool:
    """Whether it is well formed, and of the only version there is."""
    return _PATTERN.fullmatch(text) is not None


def new_traceparent() -> str:
    """A trace of its own, not sampled: it ties log lines together, and nobody has asked for more."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def trace_id_of(traceparent: str) -> str:
    """32 hexadecimal digits; empty without a trace."""
    return traceparent[3:35]


def span_id_of(traceparent: str) -> str:
    """16 hexadecimal digits; empty without a trace."""
    return traceparent[36:52]


def is_sampled(traceparent: str) -> bool:
    """Whether whoever began the trace records it."""
    return bool(traceparent) and bool(int(traceparent[53:55], 16) & _SAMPLED)
