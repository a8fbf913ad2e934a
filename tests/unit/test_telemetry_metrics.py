"""Figures as Prometheus reads them: by its own parser, over HTTP, from one process."""

import socket
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram as ReferenceHistogram
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from services.common.telemetry.metrics import Metrics

BOUNDS = (0.5, 1.0, 4.0)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every number, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.startswith("process_") and not sample.name.endswith("_created")
    }


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 0.75, 1.0, 3.0, 4.0, 4.5, 1e9]), st.integers(1, 5))))
def test_values_counted_together_are_the_same_as_one_by_one(values: list[tuple[float, int]]) -> None:
    metrics, reference = Metrics(), CollectorRegistry()
    ours = metrics.histogram("waits_seconds", "Waits.", BOUNDS)
    theirs = ReferenceHistogram("waits_seconds", "Waits.", buckets=BOUNDS, registry=reference)
    for value, times in values:
        ours.observe(value, times)
        for _ in range(times):
            theirs.observe(value)
    assert samples(generate_latest(metrics.registry).decode()) == pytest.approx(
        samples(generate_latest(reference).decode())
    )


def test_figures_are_served_until_the_process_stops() -> None:
    with Metrics() as metrics:
        answered = metrics.counter("shoal_answers", "Answers.", ["outcome"])
        metrics.gauge("shoal_workers_wanted", "Workers.", lambda: 3)
        address = metrics.serve("127.0.0.1:0", free_port())["metrics_address"]
        answered.labels("stop").inc(2)
        served = samples(scraped(address))
    assert served == {("shoal_answers_total", (("outcome", "stop"),)): 2, ("shoal_workers_wanted", ()): 3}
    with pytest.raises(OSError, match="refused"):
        scraped(address)


def test_nothing_is_served_unless_asked_for() -> None:
    with Metrics() as metrics:
        assert metrics.serve("127.0.0.1:0", 0) == {}


def test_a_taken_port_says_what_to_do() -> None:
    with socket.socket() as taken, Metrics() as metrics:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="--metrics-port"):
            metrics.serve("127.0.0.1:0", taken.getsockname()[1])


def test_two_figures_never_share_a_name() -> None:
    metrics = Metrics()
    metrics.histogram("shoal_waits_seconds", "Waits.")
    with pytest.raises(ValueError, match="shoal_waits_seconds"):
        metrics.gauge("shoal_waits_seconds", "Others.", lambda: 0)


def scraped(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        return str(response.read(), "utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
