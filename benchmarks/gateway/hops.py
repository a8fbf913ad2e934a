"""Where a token's time goes: each hop of a first token and of a further one, and what each process spends on it.

    python -m benchmarks.gateway.hops --steps engine.json

The fleet of `make bench-gateway`, at one stream and at 32, a step each 20 ms, with notes in its services (`noted`). All
are means, but where it says p50 or p99: so the hops add up. `--steps`: what `python -m benchmarks.engine --json` wrote;
the parts of a real engine's step are then in the table too.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop

from benchmarks.gateway.figures import WORKER_FLAGS
from benchmarks.gateway.fleet import Fleet, paced_fleet
from benchmarks.gateway.paced_engine import age_us
from benchmarks.gateway.streams import PROMPT
from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from shoal.bench.summary import percentile
from shoal.fleet.kind import Kind

STREAMS = (1, 32)
STEP_MS = 20.0
NUM_TOKENS = 300
NUM_FIRST_TOKENS = 192
PAUSE_S = 0.02
"""Mean, between two rounds of first tokens."""

Hop = tuple[str, str, str]
"""Its name, and the events at its beginning and end."""
TOKEN_HOPS: Sequence[Hop] = (
    ("engine -> worker front", "sampled", "front has token"),
    ("worker front -> gateway: text, link", "front has token", "gateway has token"),
    ("gateway -> client: check, stream", "gateway has token", "client has token"),
)
FIRST_TOKEN_HOPS: Sequence[Hop] = (
    ("client -> gateway", "client calls", "gateway called"),
    ("gateway: check", "gateway called", "encode asked"),
    ("gateway -> tokenizer", "encode asked", "tokenizer called"),
    ("tokenizer: encode", "tokenizer called", "tokenizer answers"),
    ("tokenizer -> gateway", "tokenizer answers", "encode answered"),
    ("gateway: fit, claim the id in Redis", "encode answered", "submit asked"),
    ("gateway -> Redis' intake -> scheduler", "submit asked", "place asked"),
    ("scheduler -> Redis' inbox -> worker front", "place asked", "worker starts"),
    ("worker front -> engine's next step", "worker starts", "step begins"),
    *TOKEN_HOPS,
)
WAYS: Mapping[Kind, str] = {
    Kind.ENGINE: "engine: plan, deliver",
    Kind.WORKER: "worker front: text, journal, link",
    Kind.GATEWAY: "gateway: check, stream",
    Kind.REDIS: "Redis: journal",
    Kind.SCHEDULER: "scheduler: events",
}


@dataclass(slots=True)
class Run:
    """What was seen from outside, by the monotonic clock in us, while nothing else ran."""

    began_us: int
    ended_us: int = 0
    passed: dict[str, list[int]] = field(default_factory=dict)
    """When tokens passed, by event."""
    cpu_us: Mapping[Kind, float] = field(default_factory=dict)
    """A token."""

    def note(self, event: str, at_us: int) -> None:
        """One has passed."""
        self.passed.setdefault(event, []).append(at_us)

    def waits_us(self, begin: str, end: str) -> list[float]:
        """Of each that passed two events noted here."""
        return [float(at - since) for since, at in zip(self.passed[begin], self.passed[end], strict=True)]

    def mean_us(self, event: str, notes: Mapping[str, Sequence[tuple[int, int]]]) -> float:
        """The mean time of an event, noted here or by a service. Raises RuntimeError if some were not noted."""
        if event in self.passed:
            passed = [(at_us, 1) for at_us in self.passed[event]]
        else:
            passed = [(at_us, num) for at_us, num in notes[event] if self.began_us <= at_us <= self.ended_us]
        number = sum(num for _, num in passed)
        if number != len(self.passed["sampled"]):
            raise RuntimeError(f"{event!r} was noted {number} times, and {len(self.passed['sampled'])} tokens came")
        return self.began_us + sum((at_us - self.began_us) * num for at_us, num in passed) / number


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, metavar="FILE", help="JSON of benchmarks.engine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with paced_fleet(STEP_MS, {Kind.WORKER: WORKER_FLAGS}, Path(folder)) as fleet:
            first = [uvloop.run(first_tokens(fleet, number)) for number in STREAMS]
            further = [uvloop.run(tokens(fleet, number)) for number in STREAMS]
        notes = {
            event: noted for file in Path(folder).iterdir() for event, noted in json.loads(file.read_text()).items()
        }
    print_hops("the first token, us", FIRST_TOKEN_HOPS, first, notes)
    print_ages(
        "call to first token, less the step",
        [run.waits_us("client calls", "client has token") for run in first],
        STEP_MS,
    )
    print()
    print_hops("a further token, us", TOKEN_HOPS, further, notes)
    print_ages("engine to client", [run.waits_us("sampled", "client has token") for run in further])
    for kind, name in WAYS.items():
        print_row(f"processor time, {name}", [run.cpu_us[kind] for run in further])
    if options.steps:
        print()
        print_steps(json.loads(options.steps.read_text())["steps"])


async def first_tokens(fleet: Fleet, num_streams: int) -> Run:
    """Ask for answers of one token, so many at once."""
    pauses = random.Random(0)
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=1, ignore_eos=True)
    async with grpc.aio.insecure_channel(fleet.gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await asyncio.gather(*(read(stub.Generate(request), Run(0)) for _ in range(num_streams)))
        run = Run(now_us())
        for _ in range(NUM_FIRST_TOKENS // num_streams):
            await asyncio.sleep(pauses.expovariate(1 / PAUSE_S))
            reading = []
            for _ in range(num_streams):
                run.note("client calls", now_us())
                reading.append(read(stub.Generate(request), run))
            await asyncio.gather(*reading)
        run.ended_us = now_us()
    run.passed["step begins"] = [at_us - round(STEP_MS * 1000) for at_us in run.passed["sampled"]]
    return run


async def tokens(fleet: Fleet, num_streams: int) -> Run:
    """Stream long answers, so many at once, and take the processes' time."""
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    async with grpc.aio.insecure_channel(fleet.gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await read(stub.Generate(request), Run(0))
        run, before = Run(now_us()), {kind: fleet.cpu_s(kind) for kind in WAYS}
        await asyncio.gather(*(read(stub.Generate(request), run) for _ in range(num_streams)))
        run.ended_us = now_us()
    number = len(run.passed["sampled"])
    run.cpu_us = {kind: (fleet.cpu_s(kind) - before[kind]) / number * 1e6 for kind in WAYS}
    return run


async def read(call: Any, run: Run) -> None:
    """Note each token: when it came, and when the engine says that it was sampled."""
    async for response in call:
        at_us = now_us()
        for token_id in response.delta.token_ids:
            run.note("sampled", at_us - age_us(token_id, at_us))
            run.note("client has token", at_us)


def now_us() -> int:
    """The clock of all notes."""
    return time.monotonic_ns() // 1000


def print_hops(
    title: str, hops: Sequence[Hop], runs: Sequence[Run], notes: Mapping[str, Sequence[tuple[int, int]]]
) -> None:
    """A row a hop, a column a run."""
    print(f"{title:44}" + "".join(f"{f'{number} streams':>12}" for number in STREAMS))
    for name, begin, end in hops:
        print_row(name, [run.mean_us(end, notes) - run.mean_us(begin, notes) for run in runs])


def print_ages(name: str, ages_us: Sequence[Sequence[float]], less_ms: float = 0.0) -> None:
    """Percentiles over all hops together."""
    for percent in (50, 99):
        print_row(f"{name}, p{percent}", [percentile(ages, percent) - less_ms * 1000 for ages in ages_us])


def print_steps(kinds: Sequence[Mapping[str, Any]]) -> None:
    """The parts of a step that decodes as many rows as there are streams."""
    of_rows = {int(kind["kind"].split()[1]): kind["parts_ms"] for kind in kinds if kind["kind"].startswith("decode, ")}
    steps = [of_rows[number] for number in STREAMS]
    print(f"{'a step of SmolLM2-135M, us':44}" + "".join(f"{f'{number} rows':>12}" for number in STREAMS))
    for part in steps[0]:
        print_row(part, [parts[part] * 1000 for parts in steps])


def print_row(name: str, values_us: Sequence[float]) -> None:
    """A row of the table."""
    print(f"{name:44}" + "".join(f"{value:12,.0f}" for value in values_us))


if __name__ == "__main__":
    main()
