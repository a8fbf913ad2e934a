"""What telemetry costs: `python -m benchmarks.telemetry --rounds 5`.

Two fleets of one of each service, side by side, are asked in turn: one is told nothing, the other serves metrics, which
are scraped every second, and sends every trace to a receiver over OTLP. Scraper and receiver are this process, so their
own time is in the figure too. Each round asks both for the same answers, in turns of order. Of two equal fleets the
one that was started second was 1.1 to 1.3 times as fast on the machine where this was written, so it is measured with
either one first, and the figure is the geometric mean of both halves' medians.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

import shoal

SCRAPE_INTERVAL_S = 1.0
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
TRACE_FLAGS_SAMPLED = "01"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet's processes, as `shoal up` prints them."""

    processes: Sequence[dict[str, Any]]

    @property
    def gateway(self) -> str:
        return str(next(each["address"] for each in self.processes if each["kind"] == "gateway"))

    def cpu_s(self) -> float:
        """CPU time so far of all processes and their children, without engines and Redis."""
        fronts = [each["pid"] for each in self.processes if each["kind"] not in ("engine", "redis")]
        engines = {each["pid"] for each in self.processes if each["kind"] == "engine"}
        found = [psutil.Process(pid) for pid in fronts]
        found += [child for process in found for child in process.children() if child.pid not in engines]
        return sum(sum(process.cpu_times()[:2]) for process in found)


@dataclass(frozen=True, slots=True)
class Load:
    """What one fleet did in one round."""

    tokens_per_s: float
    cpu_us_per_token: float


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="in each half")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with receiver() as (endpoint, batches):
        halves = [measured(endpoint, arguments, on_first=on_first) for on_first in (False, True)]
    ratios = [[on.tokens_per_s / off.tokens_per_s for off, on in half] for half in halves]
    each = ", ".join(f"{min(half):.3f} to {max(half):.3f}" for half in ratios)
    print(f"tokens a second, everything on over off: {_balanced(ratios):.3f} ({each} with on started second, first)")
    cpu = [[on.cpu_us_per_token / off.cpu_us_per_token for off, on in half] for half in halves]
    print(f"CPU time a token outside the engine, on over off: {_balanced(cpu):.3f}; {len(batches)} batches of spans")


def _balanced(halves: Sequence[Sequence[float]]) -> float:
    """What is left of the ratios without the fleets' places, which multiply one half as they divide the other."""
    return statistics.geometric_mean(statistics.median(half) for half in halves)


def measured(endpoint: str, arguments: argparse.Namespace, *, on_first: bool) -> list[tuple[Load, Load]]:
    """Each round's loads of two new fleets: off, on."""
    with ExitStack() as stack:
        fleets = {each: stack.enter_context(fleet(endpoint if each else "")) for each in (on_first, not on_first)}
        stack.enter_context(scraped(fleets[True]))
        for each in fleets:
            load(fleets[each], arguments.streams, 8, traced=each)  # warm
        rounds = []
        for number in range(arguments.rounds):
            order = (False, True) if number % 2 else (True, False)
            loads = {each: load(fleets[each], arguments.streams, arguments.max_tokens, traced=each) for each in order}
            rounds.append((loads[False], loads[True]))
            print(f"off {loads[False]}, on {loads[True]}", file=sys.stderr)
    return rounds


def load(fleet: Fleet, streams: int, max_tokens: int, *, traced: bool) -> Load:
    """Ask for as many answers at once as there are streams."""
    return asyncio.run(_load(fleet, streams, max_tokens, traced))


async def _load(fleet: Fleet, streams: int, max_tokens: int, traced: bool) -> Load:
    async with shoal.AsyncClient(fleet.gateway) as client:
        await client.list_models()
        cpu_s, began_s = fleet.cpu_s(), time.perf_counter()

        async def ask(number: int) -> None:
            traceparent = f"00-{time.time_ns():032x}-{number + 1:016x}-{TRACE_FLAGS_SAMPLED}" if traced else ""
            stream = client.generate(
                f"Story {number}:", max_tokens=max_tokens, temperature=0, ignore_eos=True, traceparent=traceparent
            )
            await stream.read()

        await asyncio.gather(*map(ask, range(streams)))
        took_s, num_tokens = time.perf_counter() - began_s, streams * max_tokens
        return Load(num_tokens / took_s, 1e6 * (fleet.cpu_s() - cpu_s) / num_tokens)


@contextmanager
def fleet(otlp_endpoint: str = "") -> Iterator[Fleet]:
    """A fleet; with an endpoint, everything is on."""
    with tempfile.TemporaryDirectory() as state_dir:
        environment = {**os.environ, "SHOAL_STATE_DIR": state_dir, "SHOAL_OTLP_ENDPOINT": otlp_endpoint}
        command = [sys.executable, "-m", "shoal.cli"]
        flags = ["--metrics"] if otlp_endpoint else []
        line = subprocess.run([*command, "up", "--detach", *flags], env=environment, capture_output=True, check=True)
        try:
            yield Fleet(json.loads(line.stdout)["processes"])
        finally:
            subprocess.run([*command, "down"], env=environment, check=True, capture_output=True)


@contextmanager
def receiver() -> Iterator[tuple[str, list[int]]]:
    """An OTLP receiver that counts the bytes of each batch. Yields its endpoint, and the counts."""
    batches: list[int] = []

    def export(request: bytes, context: object) -> bytes:
        batches.append(len(request))
        return b""  # an empty ExportTraceServiceResponse: all is taken

    service, method = EXPORT.strip("/").split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(export)}
    server = grpc.server(ThreadPoolExecutor(2), [grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", batches
    finally:
        server.stop(0).wait()


@contextmanager
def scraped(fleet: Fleet) -> Iterator[None]:
    """Read its metrics every second, as Prometheus would."""
    addresses = {each["metrics_address"] for each in fleet.processes if "metrics_address" in each}
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(SCRAPE_INTERVAL_S):
            for address in addresses:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
                    response.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
