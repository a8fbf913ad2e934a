"""Figures of one process, and the port where Prometheus reads them.

Names are the field's, with their unit: `shoal_time_to_first_token_seconds`. Labels take few values, all known when the
code is written: never a request, a worker's id, a tenant, a text. What happens for each token is counted once a step.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

from services.common.rpc import host_and_port
from services.common.telemetry.histogram import DURATION_BOUNDS_S, Histogram


class Metrics:
    """The figures of a process. Counting costs about a microsecond, whether or not anybody reads.

    A service's figures are one class in its `metrics.py`, made of this. Whatever is already a number somewhere becomes
    a gauge in one line, also from elsewhere: `metrics.gauge("shoal_workers_wanted", "...", lambda: demand.workers)`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._stop: Callable[[], None] | None = None

    def counter(self, name: str, about: str, labels: Sequence[str] = ()) -> Counter:
        """A number that only grows. Prometheus shows it as `<name>_total`."""
        return Counter(name, about, labels, registry=self.registry)

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A number that is read when somebody asks: by another thread, so `read` only looks."""
        Gauge(name, about, registry=self.registry).set_function(read)

    def histogram(self, name: str, about: str, bounds: Sequence[float] = DURATION_BOUNDS_S) -> Histogram:
        """How values are distributed; by default, durations in seconds."""
        histogram = Histogram(name, about, bounds)
        self.registry.register(histogram)
        return histogram

    def serve(self, listen: str, port: int) -> dict[str, str]:
        """Answer `GET /metrics` at this port of the host in `listen`, in a thread of its own, until the block is left.

        Returns what the process announces of it: `metrics_address`, or nothing if the port is 0: it is not served then.
        Raises OSError if the port is taken.
        """
        if not port:
            return {}
        host, _ = host_and_port(listen)
        try:
            server, thread = start_http_server(port, host.strip("[]") or "0.0.0.0", self.registry)
        except OSError as error:
            raise OSError(
                f"can't serve metrics on {host}:{port}: {error.strerror}. Choose another --metrics-port, or 0 for none"
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop
        return {"metrics_address": f"{host}:{port}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stop is not None:
            self._stop()
