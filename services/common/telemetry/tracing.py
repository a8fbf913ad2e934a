"""Spans: one for each phase of a request, never one for each token; exported over OTLP where an endpoint is given.

Without an endpoint nothing of OpenTelemetry is imported, and a request's `traceparent` is still carried on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

from services.common.config import ConfigError
from services.common.telemetry.trace_context import new_traceparent

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


class Side(Enum):
    """Where a span stands in a call between processes."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


class Span(Protocol):
    """A phase that began. Whoever began it ends it, once."""

    @property
    def traceparent(self) -> str:
        """For what happens inside it, in this process or another."""
        ...

    def end(self, attributes: Attributes | None = None, *, error: str = "", at_ns: int | None = None) -> None:
        """It is over, now or at this time (ns since the epoch). `error`: why it failed, in a word of few."""
        ...


class Tracer(Protocol):
    """Begins spans."""

    @property
    def enabled(self) -> bool:
        """Whether anybody records them: if not, what only they need may be left out."""
        ...

    def begin(
        self, name: str, parent: str, attributes: Attributes | None = None, *, side: Side = Side.INTERNAL,
        at_ns: int | None = None,
    ) -> Span:  # fmt: skip
        """A phase begins, now or at this time. `parent`: a traceparent; empty: a trace of its own."""
        ...


class NoTracer:
    """Nobody records spans."""

    enabled = False

    def begin(
        self, name: str, parent: str, attributes: Attributes | None = None, *, side: Side = Side.INTERNAL,
        at_ns: int | None = None,
    ) -> Span:  # fmt: skip
        """Hand on the parent's trace, or a new one for log lines."""
        return _NoSpan(parent or new_traceparent())


class _NoSpan:
    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def end(self, attributes: Attributes | None = None, *, error: str = "", at_ns: int | None = None) -> None:
        """Nothing."""


@contextmanager
def tracing(endpoint: str, service: str) -> Iterator[Tracer]:
    """The tracer of a process; at the end, what waits is sent, within some seconds.

    `endpoint`: `http://host:port` of an OTLP receiver over gRPC (https: with TLS); empty: none. Raises ConfigError if
    OpenTelemetry is not installed.
    """
    if not endpoint:
        yield NoTracer()
        return
    try:
        from services.common.telemetry.otlp import OtlpTracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'shoal-inference[telemetry]', or leave it out"
        ) from error
    tracer = OtlpTracer(endpoint, service)
    try:
        yield tracer
    finally:
        tracer.close()


def ns_of_ms(at_ms: int) -> int:
    """Redis' time (ms since the epoch) as spans have it. Never ahead of this process' clock: a span would end first."""
    return min(at_ms * 1_000_000, time.time_ns())
