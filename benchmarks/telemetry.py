"""What telemetry costs: `python -m benchmarks.telemetry --rounds 5`.

One fleet of one of each service, whose processes all serve metrics and have a tracer, is asked for the same answers in
turns. On: every request is traced to a receiver over OTLP, and every process is scraped each 5 s, three times as often
as is usual. Off: no request asks to be recorded, and nobody scrapes. Receiver and scraper are this process, so their
own time counts too. Counting itself is always on: `step_done` of 32 sequences took 35 us, of a step of over 100 ms.

It is one fleet, not two, since of two equal ones side by side the second was up to 1.3 times as fast.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

import shoal

SCRAPE_INTERVAL_S = 5.0
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


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
    cpu_share: float
    """CPU time of all processes but the engine, of that of all cores."""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with receiver() as (endpoint, batches), fleet(endpoint) as asked:
        load(asked, arguments.streams, 8, told=True)  # warm
        rounds = []
        for number in range(arguments.rounds):
            order = (False, True) if number % 2 else (True, False)
            loads = {told: load(asked, arguments.streams, arguments.max_tokens, told=told) for told in order}
            rounds.append((loads[False], loads[True]))
            print(f"off {loads[False]}, on {loads[True]}", file=sys.stderr)
    speeds = [on.tokens_per_s / off.tokens_per_s for off, on in rounds]
    print(
        f"tokens a second, on over off: median {statistics.median(speeds):.3f} ({min(speeds):.3f} to {max(speeds):.3f})"
    )
    added = [on.cpu_share - off.cpu_share for off, on in rounds]
    print(f"CPU outside the engine, of all cores: {statistics.median(added):+.2%} when on; {len(batches)} exports")


def load(fleet: Fleet, streams: int, max_tokens: int, *, told: bool) -> Load:
    """Ask for as many answers at once as there are streams."""
    with scraped(fleet) if told else nullcontext():
        return asyncio.run(_load(fleet, streams, max_tokens, "01" if told else "00"))


async def _load(fleet: Fleet, streams: int, max_tokens: int, trace_flags: str) -> Load:
    async with shoal.AsyncClient(fleet.gateway) as client:
        await client.list_models()
        cpu_s, began_s = fleet.cpu_s(), time.perf_counter()

        async def ask(number: int) -> None:
            traceparent = f"00-{time.time_ns():032x}-{number + 1:016x}-{trace_flags}"
            stream = client.generate(
                f"Story {number}:", max_tokens=max_tokens, temperature=0, ignore_eos=True, traceparent=traceparent
            )
            await stream.read()

        await asyncio.gather(*map(ask, range(streams)))
        took_s = time.perf_counter() - began_s
        share = (fleet.cpu_s() - cpu_s) / (took_s * (os.cpu_count() or 1))
        return Load(streams * max_tokens / took_s, share)


@contextmanager
def fleet(otlp_endpoint: str) -> Iterator[Fleet]:
    """One that can tell everything."""
    with tempfile.TemporaryDirectory() as state_dir:
        environment = {**os.environ, "SHOAL_STATE_DIR": state_dir, "SHOAL_OTLP_ENDPOINT": otlp_endpoint}
        command = [sys.executable, "-m", "shoal.cli"]
        up = [*command, "up", "--detach", "--metrics"]
        line = subprocess.run(up, env=environment, capture_output=True, check=True).stdout
        try:
            yield Fleet(json.loads(line)["processes"])
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
    """Read its metrics at once and then each interval, as Prometheus would, until the block is left."""
    addresses = {each["metrics_address"] for each in fleet.processes if "metrics_address" in each}
    stop = threading.Event()

    def scrape() -> None:
        while True:
            for address in addresses:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
                    response.read()
            if stop.wait(SCRAPE_INTERVAL_S):
                return

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
