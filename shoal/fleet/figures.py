"""What a fleet's metrics say, from two readings: rates between them, and what is now."""

import time
import urllib.request
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException

READ_LIMIT_S = 2.0
AT_ONCE = 16

Samples = Mapping[tuple[str, str], float]
"""By name and by the label that is told apart (`le`, or empty): others are summed up."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics of all processes at one time. `at_s`: monotonic. None: that process did not answer."""

    at_s: float
    by_address: Mapping[str, Samples | None]


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker. Rates and means are of the time between the readings; None: nothing happened in it."""

    address: str
    running: int
    waiting: int
    kv_usage: float
    """Share of KV blocks held."""
    tokens_per_s: float
    batch: float | None
    step_ms: float | None
    inter_token_ms: float | None
    preemptions: int
    """Since it started."""


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """A whole fleet. Percentiles are of the time between the readings, to the width of a bucket."""

    queued: int
    open_streams: int
    requests_per_s: float
    refusals_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    leaders: int
    """1, unless there is no leader, or not all schedulers are read."""
    workers_wanted: int
    """As the leader tells."""
    workers: tuple[WorkerFigures, ...]
    away: tuple[str, ...]
    """Addresses that did not answer."""


def read(addresses: Sequence[str]) -> Reading:
    """Read the metrics at these addresses, all at once. Takes up to READ_LIMIT_S."""
    with ThreadPoolExecutor(min(AT_ONCE, len(addresses))) as threads:
        return Reading(time.monotonic(), dict(zip(addresses, threads.map(_samples_at, addresses), strict=True)))


def figures(before: Reading, now: Reading) -> FleetFigures:
    """What happened between two readings. A process that was started meanwhile, or anew, counts from its start."""
    took_s = max(now.at_s - before.at_s, 1e-9)
    spans = {
        address: _Span(before.by_address.get(address) or {}, samples, took_s)
        for address, samples in now.by_address.items()
        if samples is not None
    }
    workers = tuple(
        _worker(address, span) for address, span in spans.items() if ("shoal_kv_cache_usage_ratio", "") in span.now
    )
    buckets = _grown_buckets(spans.values(), "shoal_time_to_first_token_seconds_bucket")
    return FleetFigures(
        queued=sum(int(span.value("shoal_queued_requests")) for span in spans.values()),
        open_streams=sum(int(span.value("shoal_open_streams")) for span in spans.values()),
        requests_per_s=sum(span.rate("shoal_requests_total") for span in spans.values()),
        refusals_per_s=sum(span.rate("shoal_refusals_total") for span in spans.values()),
        tokens_per_s=sum(worker.tokens_per_s for worker in workers),
        ttft_p50_ms=_percentile_ms(buckets, 0.5),
        ttft_p99_ms=_percentile_ms(buckets, 0.99),
        leaders=sum(int(span.value("shoal_leader")) for span in spans.values()),
        workers_wanted=sum(int(span.value("shoal_workers_wanted")) for span in spans.values()),
        workers=workers,
        away=tuple(address for address, samples in now.by_address.items() if samples is None),
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """One process between two readings."""

    before: Samples
    now: Samples
    took_s: float

    def value(self, name: str) -> float:
        return self.now.get((name, ""), 0.0)

    def growth(self, name: str, label: str = "") -> float:
        now, before = self.now.get((name, label), 0.0), self.before.get((name, label), 0.0)
        return now - before if now >= before else now

    def rate(self, name: str) -> float:
        return self.growth(name) / self.took_s

    def mean(self, histogram: str) -> float | None:
        count = self.growth(f"{histogram}_count")
        return self.growth(f"{histogram}_sum") / count if count else None


def _worker(address: str, span: _Span) -> WorkerFigures:
    def mean_ms(histogram: str) -> float | None:
        mean_s = span.mean(histogram)
        return None if mean_s is None else 1000 * mean_s

    return WorkerFigures(
        address=address,
        running=int(span.value("shoal_running_sequences")),
        waiting=int(span.value("shoal_waiting_sequences")),
        kv_usage=span.value("shoal_kv_cache_usage_ratio"),
        tokens_per_s=span.rate("shoal_generation_tokens_total"),
        batch=span.mean("shoal_batch_size_sequences"),
        step_ms=mean_ms("shoal_step_duration_seconds"),
        inter_token_ms=mean_ms("shoal_inter_token_latency_seconds"),
        preemptions=int(span.value("shoal_preemptions_total")),
    )


def _grown_buckets(spans: Iterable[_Span], name: str) -> list[tuple[float, float]]:
    """(upper end, values not above it), ascending, over all processes."""
    totals: dict[float, float] = {}
    for span in spans:
        for sample, label in span.now:
            if sample == name:
                totals[float(label)] = totals.get(float(label), 0.0) + span.growth(name, label)
    return sorted(totals.items())


def _percentile_ms(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """As Prometheus' histogram_quantile: even within a bucket; the last finite end for what is above it."""
    if not buckets or not buckets[-1][1]:
        return None
    rank = share * buckets[-1][1]
    at = bisect_left([count for _, count in buckets], rank)
    low, below = buckets[at - 1] if at else (0.0, 0.0)
    high, count = buckets[at]
    return 1000 * (low if high == float("inf") else low + (high - low) * (rank - below) / (count - below))


def _samples_at(address: str) -> Samples | None:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=READ_LIMIT_S) as response:
            text = str(response.read(), "utf-8")
        families = list(text_string_to_metric_families(text))
    except (OSError, HTTPException, ValueError):
        # Nobody is there, or somebody who serves no metrics: a gateway's own port, say.
        return None
    samples: dict[tuple[str, str], float] = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, sample.labels.get("le", ""))
            samples[key] = samples.get(key, 0.0) + sample.value
    return samples
