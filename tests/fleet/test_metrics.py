"""What a fleet's operators measure: every process' figures, scraped by a real Prometheus, add up to what was asked.

The tests of Prometheus itself need its program (Debian: `apt-get install prometheus`) and are skipped without it.
"""

import json
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import shoal
from tests.fleet.conftest import Fleet
from tests.unit.test_telemetry_metrics import free_port

WITHIN_S = 30.0
NUM_TOKENS = 5
ALLOWED_LABELS = {"le", "outcome", "reason", "state", "operation"}
"""No request, no tenant, no worker's id: labels take few values."""
EXPECTED = {
    "gateway": {
        "shoal_time_to_first_token_seconds", "shoal_e2e_request_latency_seconds", "shoal_encode_duration_seconds",
        "shoal_intake_duration_seconds", "shoal_requests", "shoal_refusals", "shoal_open_streams",
    },
    "tokenizer": {
        "shoal_tokenizer_jobs", "shoal_tokenizer_job_duration_seconds", "shoal_tokenizer_queued_inputs",
    },
    "scheduler": {
        "shoal_leader", "shoal_queued_requests", "shoal_workers", "shoal_placements", "shoal_requeues",
        "shoal_placement_duration_seconds", "shoal_reserved_kv_blocks",
    },
    "worker": {
        "shoal_request_queue_time_seconds", "shoal_inter_token_latency_seconds", "shoal_step_duration_seconds",
        "shoal_batch_size_sequences", "shoal_kv_cache_usage_ratio", "shoal_cached_prompt_tokens", "shoal_preemptions",
        "shoal_attempts", "shoal_requeues", "shoal_journal_flush_duration_seconds", "shoal_generation_tokens",
        "shoal_prompt_tokens",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    fleet = start("--metrics")
    with fleet.client() as client:
        for _ in range(3):
            client.generate("Oceans are", max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True).read()
        with pytest.raises(shoal.InvalidRequest):
            client.generate("x", max_tokens=1, stop=[""]).read()
    return fleet


def scraped(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        families = text_string_to_metric_families(str(response.read(), "utf-8"))
        return {family.name: family for family in families}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_service_tells_its_figures_under_the_fields_names(fleet: Fleet, kind: str) -> None:
    (process,) = fleet.of_kind(kind)
    families = scraped(process.metrics_address)
    assert EXPECTED[kind] <= set(families)
    for family in families.values():
        assert family.documentation
        for sample in family.samples:
            assert set(sample.labels) <= ALLOWED_LABELS


def test_the_engine_process_is_measured_by_its_front(fleet: Fleet) -> None:
    (worker,) = fleet.of_kind("worker")
    families = scraped(worker.metrics_address)
    assert _value(families, "shoal_generation_tokens_total") == 3 * NUM_TOKENS
    assert _value(families, "shoal_inter_token_latency_seconds_count") == 3 * (NUM_TOKENS - 1)
    assert _value(families, "shoal_step_duration_seconds_count") == 3 * NUM_TOKENS
    assert _value(families, "shoal_batch_size_sequences_sum") == 3 * NUM_TOKENS
    assert _value(families, "shoal_kv_cache_usage_ratio") == 0


class Prometheus:
    """A real one, that scrapes the fleet."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: str) -> None:
        self._process = process
        self._address = address

    def value(self, query: str, wanted: float) -> None:
        """Wait until a query has this one value."""
        seen: Any = None
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "Prometheus ended"
            seen = self._ask("query", query=query)
            if [float(each["value"][1]) for each in seen["result"]] == [wanted]:
                return
            time.sleep(0.1)
        raise AssertionError(f"{query} is not {wanted} but {seen}")

    def _ask(self, path: str, **arguments: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return json.load(response)["data"]
        except OSError:
            return {"result": []}


@pytest.fixture(scope="module")
def prometheus(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    jobs = [
        {"job_name": kind, "static_configs": [{"targets": [each.metrics_address for each in fleet.of_kind(kind)]}]}
        for kind in EXPECTED
    ]
    # YAML takes JSON.
    config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with Path(folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(process, address)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def test_a_real_prometheus_reads_every_process(prometheus: Prometheus) -> None:
    prometheus.value("sum(up)", len(EXPECTED))


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("sum(shoal_time_to_first_token_seconds_count)", 3),
        ("histogram_quantile(0.99, sum by (le) (shoal_time_to_first_token_seconds_bucket)) > bool 0", 1),
        ('sum(shoal_requests_total{outcome="length"})', 3),
        ('sum(shoal_refusals_total{job="gateway",reason="INVALID_FIELD"})', 1),
        ("sum(shoal_placements_total)", 3),
        ("sum(shoal_attempts_total)", 3),
        ("sum(shoal_leader)", 1),
        ("sum(shoal_workers)", 1),
        ("sum(shoal_open_streams)", 0),
        ("sum(shoal_journal_tokens_total) <= bool sum(shoal_generation_tokens_total)", 1),
        ('sum(shoal_tokenizer_jobs_total{operation="encode"})', 3),
    ],
)
def test_its_queries_give_what_was_asked_of_the_fleet(prometheus: Prometheus, query: str, value: float) -> None:
    prometheus.value(query, value)


def _value(families: dict[str, Any], sample_name: str) -> float:
    (value,) = [s.value for family in families.values() for s in family.samples if s.name == sample_name]
    return float(value)


def test_top_shows_the_fleet_at_work(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = client.generate("Oceans are", max_tokens=400, temperature=0, ignore_eos=True)
        next(stream)
        once = fleet.command("top", "--once", "--json", "--interval-s", "0.5")
        for_people = fleet.command("top", "--once", "--interval-s", "0.2")
        stream.cancel()
        stream.read()
    shown = json.loads(once.stdout)
    (worker,) = shown["workers"]
    assert worker["address"] == fleet.of_kind("worker")[0].metrics_address
    assert (shown["open_streams"], shown["queued"], shown["leaders"], shown["away"]) == (1, 0, 1, [])
    assert (worker["running"], worker["batch"]) == (1, 1)
    assert shown["tokens_per_s"] == worker["tokens_per_s"] > 0
    assert 0 < worker["kv_usage"] < 1
    assert worker["address"] in for_people.stdout


def test_trace_tells_what_became_of_a_request(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = client.generate(
            "Oceans are", max_tokens=3, ignore_eos=True, traceparent=f"00-{'ab' * 16}-{'1' * 16}-00"
        )
        stream.read()
    told = fleet.command("trace", stream.request_id)
    assert told.returncode == 0
    assert f"trace {'ab' * 16}" in told.stdout
    places = [told.stdout.index(word) for word in ("accepted", "placed", "finished", "to the first token")]
    assert places[0] < places[1] < places[3]
    info = json.loads(fleet.command("trace", stream.request_id, "--json").stdout)
    assert (info["state"], info["attempts"], info["usage"]["completion_tokens"]) == ("finished", 1, 3)
    unknown = fleet.command("trace", "nothing")
    assert (unknown.returncode, "unknown" in unknown.stderr) == (1, True)
