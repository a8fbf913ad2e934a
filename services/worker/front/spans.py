"""The spans of one attempt at a request: `attempt`, and inside it `prefill`, `decode` and `finish`.

Phases are noted as they pass, and told together at the attempt's end: a token costs nothing here.
"""

import time

from services.common.ids import WorkerId
from services.common.store.inbox import Start
from services.common.telemetry import conventions
from services.common.telemetry.tracing import Attributes, Span, Tracer


class AttemptSpans:
    """Owned by the session. Times are the front's monotonic clock, in s."""

    def __init__(self, tracer: Tracer, start: Start, worker: WorkerId) -> None:
        attributes: Attributes = {
            conventions.ATTEMPT: start.attempt.number,
            conventions.WORKER: worker,
            conventions.USAGE_INPUT_TOKENS: len(start.payload.prompt_token_ids),
        }
        self._tracer = tracer
        self._attempt = tracer.begin("attempt", start.payload.traceparent, attributes)
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._began_s: float | None = None
        self._ended = False

    def step_began(self, now_s: float) -> None:
        """A step that holds one of its sequences begins; the first one counts."""
        if self._began_s is None:
            self._began_s = now_s

    def finish(self) -> Span:
        """Its end is being written."""
        return self._tracer.begin("finish", self._attempt.traceparent)

    def end(
        self, first_token_s: float | None, last_token_s: float | None, cached_tokens: int, generated_tokens: int,
        *, error: str = "",
    ) -> None:  # fmt: skip
        """It is over; the first call counts. Times are None for what it did not come to. `error`: why it failed."""
        if self._ended or not self._tracer.enabled:
            return
        self._ended = True
        if self._began_s is not None:
            self._phase("prefill", self._began_s, first_token_s, {conventions.USAGE_CACHED_TOKENS: cached_tokens})
        if first_token_s is not None:
            self._phase("decode", first_token_s, last_token_s, {conventions.USAGE_OUTPUT_TOKENS: generated_tokens})
        self._attempt.end(error=error)

    def _phase(self, name: str, from_s: float, to_s: float | None, attributes: dict[str, int]) -> None:
        span = self._tracer.begin(name, self._attempt.traceparent, attributes, at_ns=self._ns(from_s))
        span.end(at_ns=None if to_s is None else self._ns(to_s))

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + round(at_s * 1e9)
