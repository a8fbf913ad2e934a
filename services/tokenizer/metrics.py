"""What a tokenizer counts."""

from collections.abc import Callable

from services.common.errors import ShoalError
from services.common.telemetry.metrics import Metrics
from services.tokenizer.frames import Operation


class TokenizerMetrics:
    """Figures of one tokenizer service. Counted in its front, on the event loop."""

    def __init__(self, metrics: Metrics, num_queued: Callable[[], int]) -> None:
        """`num_queued`: inputs that wait for a process."""
        self._jobs = metrics.counter("shoal_tokenizer_jobs", "Inputs worked at, by what was asked.", ["operation"])
        self._input_bytes = metrics.counter("shoal_tokenizer_input_bytes", "Bytes of all inputs, serialized.")
        self._durations = metrics.histogram(
            "shoal_tokenizer_job_duration_seconds",
            "From an input's arrival to its answer, waiting for a process included.",
        )
        self._refusals = metrics.counter(
            "shoal_refusals", "Inputs that were refused or failed, by the error's reason.", ["reason"]
        )
        metrics.gauge("shoal_tokenizer_queued_inputs", "Inputs that wait for a process now.", num_queued)

    def done(self, operation: Operation, num_bytes: int, took_s: float) -> None:
        """An input was worked at."""
        self._jobs.labels(operation.name.lower()).inc()
        self._input_bytes.inc(num_bytes)
        self._durations.observe(took_s)

    def refused(self, error: ShoalError) -> None:
        """An input got an error instead."""
        self._refusals.labels(error.reason or error.code.name).inc()
