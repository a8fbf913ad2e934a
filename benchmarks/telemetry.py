"""What telemetry costs: `python -m benchmarks.telemetry --pairs 8`.

One fleet of one of each service, whose processes all serve metrics and have a tracer, is asked for the same answers in
turns. On: every request is traced to a receiver over OTLP, and every process is scraped each 5 s, three times as often
as is usual. Off: no request asks to be recorded, and nobody scrapes. Counting itself is always on.

The figure is processor time a token, since where engine and fleet share cores that are busy, throughput is what these
leave: what telemetry adds to all processes but engine and Redis, which it does not touch, of all that a token takes.
Tokens a second by the clock differ by more than the 3 % in question from one round to the next; this does not. Receiver
and scraper are this process, and their time counts, as if they ran on the same machine.
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
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

import shoal

TOUCHED = frozenset({"gateway", "tokenizer", "scheduler", "worker"})
OTHERS = frozenset({"engine", "redis"})
SCRAPE_INTERVAL_S = 5.0
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet's processes, as `shoal up` prints them."""

    processes: Sequence[dict[str, Any]]

    @property
    def gateway(self) -> str:
        return str(next(each["address"] for each in self.processes if each["kind"] == "gateway"))

    def cpu_s(self, kinds: Container[str]) -> float:
        """CPU time so far of the processes of these kinds, a tokenizer's with its pool's."""
        found = [psutil.Process(each["pid"]) for each in self.processes if each["kind"] in kinds]
        if "tokenizer" in kinds:
            pids = [each["pid"] for each in self.processes if each["kind"] == "tokenizer"]
            found += [child for pid in pids for child in psutil.Process(pid).children()]
        return sum(sum(process.cpu_times()[:2]) for process in found)


@dataclass(frozen=True, slots=True)
class Load:
    """What the fleet did in one round; CPU time in us a token."""

    tokens_per_s: float
    touched_us: float
    """Of what telemetry touches: all processes but engine and Redis, and this one."""
    others_us: float
    """Of engine and Redis."""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with receiver() as (endpoint, batches), fleet(endpoint) as asked:
        load(asked, arguments.streams, 8, told=True)  # warm
        pairs = []
        for number in range(arguments.pairs):
            order = (False, True) if number % 2 else (True, False)
            loads = {told: load(asked, arguments.streams, arguments.max_tokens, told=told) for told in order}
            pairs.append((loads[False], loads[True]))
            print(f"off {loads[False]}, on {loads[True]}", file=sys.stderr)
    whole_us = statistics.median(off.touched_us + off.others_us for off, _ in pairs)
    added = [(on.touched_us - off.touched_us) / whole_us for off, on in pairs]
    low, middle, high = statistics.quantiles(added, n=4)
    error = statistics.stdev(added) / len(added) ** 0.5
    print(f"processor time a token: {whole_us:,.0f} us, of which telemetry adds {middle:+.2%} when on")
    print(
        f"  {len(pairs)} pairs: quartiles {low:+.2%} and {high:+.2%}, "
        f"mean {statistics.fmean(added):+.2%} +- {error:.2%}"
    )
    speeds = [on.tokens_per_s / off.tokens_per_s for off, on in pairs]
    print(
        f"  tokens a second by the clock, on over off: median {statistics.median(speeds):.3f}; {len(batches)} exports"
    )


def load(fleet: Fleet, streams: int, max_tokens: int, *, told: bool) -> Load:
    """Ask for as many answers at once as there are streams."""
    with scraped(fleet) if told else nullcontext():
        return asyncio.run(_load(fleet, streams, max_tokens, "01" if told else "00"))


async def _load(fleet: Fleet, streams: int, max_tokens: int, trace_flags: str) -> Load:
    async with shoal.AsyncClient(fleet.gateway) as client:
        await client.list_models()
        began = (time.perf_counter(), _touched_s(fleet), fleet.cpu_s(OTHERS))

        async def ask(number: int) -> None:
            traceparent = f"00-{time.time_ns():032x}-{number + 1:016x}-{trace_flags}"
            stream = client.generate(
                f"Story {number}:", max_tokens=max_tokens, temperature=0, ignore_eos=True, traceparent=traceparent
            )
            await stream.read()

        await asyncio.gather(*map(ask, range(streams)))
        ended = (time.perf_counter(), _touched_s(fleet), fleet.cpu_s(OTHERS))
    took_s, touched_s, others_s = (end - begin for begin, end in zip(began, ended, strict=True))
    num_tokens = streams * max_tokens
    return Load(num_tokens / took_s, touched_s / num_tokens * 1e6, others_s / num_tokens * 1e6)


def _touched_s(fleet: Fleet) -> float:
    return fleet.cpu_s(TOUCHED) + time.process_time()


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
