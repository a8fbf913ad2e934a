"""What a gateway counts."""

from collections.abc import Callable

from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import ShoalError
from services.common.telemetry.metrics import Metrics
from services.gateway.streams import End, Stream

OUTCOMES = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_CANCELLED: "cancelled",
}
LEFT = "left"
"""The client hung up before the end."""


class GatewayMetrics:
    """Figures of one gateway. Counted on its event loop."""

    def __init__(self, metrics: Metrics, num_streams: Callable[[], int], clock: Callable[[], float]) -> None:
        """`num_streams`: open ones. `clock`: the loop's, in s."""
        self._clock = clock
        self.time_to_first_token = metrics.histogram(
            "shoal_time_to_first_token_seconds", "From a call's arrival at the gateway to its first token there."
        )
        self.e2e_latency = metrics.histogram(
            "shoal_e2e_request_latency_seconds", "From a call's arrival to the end of its stream, read by its client."
        )
        self.encode = metrics.histogram(
            "shoal_encode_duration_seconds", "One prompt's way to a tokenizer and back, retries included."
        )
        self.intake = metrics.histogram(
            "shoal_intake_duration_seconds", "Storing one request in Redis, retries included: then it is accepted."
        )
        self._requests = metrics.counter(
            "shoal_requests", "Streams of calls that ended, by how: a finish reason, an error's reason, or left.",
            ["outcome"],
        )  # fmt: skip
        self._refusals = metrics.counter(
            "shoal_refusals", "Calls that were refused before anything was stored, by the error's reason.", ["reason"]
        )
        self._attaches = metrics.counter("shoal_attaches", "Streams that a client went on reading at this gateway.")
        metrics.gauge("shoal_open_streams", "Streams that are open now.", num_streams)

    def refused(self, error: ShoalError) -> None:
        """A call gets this instead of a stream."""
        self._refusals.labels(error.reason or error.code.name).inc()

    def attached(self) -> None:
        """A stream was opened for an Attach."""
        self._attaches.inc()

    def first_token(self, stream: Stream) -> None:
        """The first token of a stream has come."""
        if stream.called_at_s is not None and stream.first_token_at_s is not None:
            self.time_to_first_token.observe(stream.first_token_at_s - stream.called_at_s)

    def ended(self, stream: Stream) -> None:
        """A stream is closed."""
        self._requests.labels(_outcome(stream.end)).inc()
        if stream.called_at_s is not None:
            self.e2e_latency.observe(self._clock() - stream.called_at_s)


def _outcome(end: End | None) -> str:
    if end is None:
        return LEFT
    if isinstance(end, ShoalError):
        return (end.reason or end.code.name).lower()
    return OUTCOMES.get(end.reason, "unspecified")
