"""What `shoal top` makes of two readings, and what `shoal trace` says of a record."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal._values import Decision, RequestInfo, RequestState, Timings, Usage
from shoal.cli import trace
from shoal.fleet.figures import Reading, Samples, figures, read

GATEWAY, WORKER, SCHEDULER = "h:1", "h:2", "h:3"


def a_worker(tokens: float, steps: float = 0, step_sum_s: float = 0, kv_usage: float = 0.5) -> Samples:
    return {
        ("shoal_kv_cache_usage_ratio", ""): kv_usage,
        ("shoal_generation_tokens_total", ""): tokens,
        ("shoal_step_duration_seconds_count", ""): steps,
        ("shoal_step_duration_seconds_sum", ""): step_sum_s,
        ("shoal_batch_size_sequences_count", ""): steps,
        ("shoal_batch_size_sequences_sum", ""): 3 * steps,
    }


def a_gateway(below_100_ms: float, below_200_ms: float, above: float = 0) -> Samples:
    name = "shoal_time_to_first_token_seconds_bucket"
    return {(name, "0.1"): below_100_ms, (name, "0.2"): below_200_ms, (name, "+Inf"): below_200_ms + above}


def test_rates_are_of_the_time_between_the_readings() -> None:
    shown = figures(
        Reading(10.0, {WORKER: a_worker(100, steps=10, step_sum_s=1)}),
        Reading(12.0, {WORKER: a_worker(300, steps=50, step_sum_s=3)}),
    )
    (worker,) = shown.workers
    assert shown.tokens_per_s == worker.tokens_per_s == 100
    assert (worker.batch, worker.kv_usage) == (3, 0.5)
    assert worker.step_ms == pytest.approx(50)
    assert worker.inter_token_ms is None, "none was told of"


def test_a_worker_that_was_started_anew_counts_from_its_start() -> None:
    shown = figures(Reading(0, {WORKER: a_worker(1_000)}), Reading(1, {WORKER: a_worker(20)}))
    assert shown.tokens_per_s == 20


@pytest.mark.parametrize(
    ("now", "p50_ms"),
    [(a_gateway(10, 10), 50), (a_gateway(0, 10), 150), (a_gateway(5, 10), 100), (a_gateway(0, 0, above=3), 200)],
)
def test_percentiles_are_even_within_a_bucket(now: Samples, p50_ms: float) -> None:
    shown = figures(Reading(0, {GATEWAY: a_gateway(0, 0)}), Reading(1, {GATEWAY: now}))
    assert shown.ttft_p50_ms == pytest.approx(p50_ms)


def test_without_a_first_token_there_is_no_percentile() -> None:
    shown = figures(Reading(0, {GATEWAY: a_gateway(4, 9)}), Reading(1, {GATEWAY: a_gateway(4, 9)}))
    assert shown.ttft_p50_ms is shown.ttft_p99_ms is None


def test_who_does_not_answer_is_named_and_the_rest_is_shown() -> None:
    leader: Samples = {
        ("shoal_leader", ""): 1, ("shoal_queued_requests", ""): 7, ("shoal_workers_wanted", ""): 2,
    }  # fmt: skip
    shown = figures(Reading(0, {}), Reading(1, {WORKER: None, SCHEDULER: leader}))
    assert (shown.away, shown.queued, shown.leaders, shown.workers) == ((WORKER,), 7, 1, ())
    assert shown.workers_wanted == 2


@pytest.mark.parametrize(
    "said", [b"\0\0\x12\4\0", b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n<html> {"], ids=["grpc", "html"]
)
def test_who_serves_something_else_there_does_not_answer(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        with ThreadPoolExecutor(1) as threads:
            threads.submit(answer)
            assert read([f"{host}:{port}"]).by_address == {f"{host}:{port}": None}


def test_a_worker_that_came_between_the_readings_counts_from_its_start() -> None:
    shown = figures(Reading(0, {}), Reading(2, {WORKER: a_worker(20)}))
    assert (shown.tokens_per_s, len(shown.workers)) == (10, 1)


def test_a_record_reads_as_its_phases() -> None:
    info = RequestInfo(
        request_id="r-1", state=RequestState.FINISHED, usage=Usage(12, 8, 60), model="m", attempts=2, error="",
        timings=Timings(placed_ms=3, first_token_ms=41, finished_ms=400), trace_id="ab" * 16,
        decisions=(
            Decision(0, "accepted", 1, "gateway#1"), Decision(3, "placed", 1, "w-1"),
            Decision(120, "requeued", 2, "worker lost"), Decision(121, "placed", 2, "w-2"),
            Decision(400, "finished", 2, ""),
        ),
    )  # fmt: skip
    assert trace.lines_of(info) == [
        "r-1: finished, attempts: 2, model m",
        f"trace {'ab' * 16}; 12 prompt tokens (8 cached), 60 generated",
        "",
        "    at ms    after  attempt  decision",
        "        0       +0        1  accepted gateway#1",
        "        3       +3        1  placed w-1",
        "      120     +117        2  requeued worker lost",
        "      121       +1        2  placed w-2",
        "      400     +279        2  finished",
        "",
        "in the queue 3 ms, to the first token 38 ms, from there to the end 359 ms",
    ]
