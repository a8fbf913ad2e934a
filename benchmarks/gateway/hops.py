"""Where a token's time goes between engine and client, and what each process spends on it.

    python -m benchmarks.gateway.hops

The fleet of `make bench-gateway`, at one stream and at 32, a step each 20 ms: the time from a step's end in the engine
to the client's reading of the token, and each process's processor time a token.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
WAYS: Mapping[Kind, str] = {
    Kind.ENGINE: "engine: plan, deliver",
    Kind.WORKER: "worker front: text, journal, link",
    Kind.GATEWAY: "gateway: check, stream",
    Kind.REDIS: "Redis: journal",
    Kind.SCHEDULER: "scheduler: events",
}


@dataclass(slots=True)
class Seen:
    """Of all streams of one run."""

    ages_us: list[float] = field(default_factory=list)
    cpu_us: Mapping[Kind, float] = field(default_factory=dict)
    """A token."""


def main() -> None:
    """Measure and print."""
    with paced_fleet(STEP_MS, {Kind.WORKER: WORKER_FLAGS}) as fleet:
        runs = {number: uvloop.run(measure(fleet, number)) for number in STREAMS}
    print(f"{'a token, us':36}" + "".join(f"{f'{number} streams':>12}" for number in STREAMS))
    for percent in (50, 99):
        row = [percentile(seen.ages_us, percent) for seen in runs.values()]
        print(f"{f'engine to client, p{percent}':36}" + "".join(f"{value:12.0f}" for value in row))
    for kind, name in WAYS.items():
        print(f"{f'processor, {name}':36}" + "".join(f"{seen.cpu_us[kind]:12.0f}" for seen in runs.values()))


async def measure(fleet: Fleet, num_streams: int) -> Seen:
    """Stream, and take the tokens' ages and the processes' time."""
    seen = Seen()
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)

    async def read(call: Any) -> None:
        async for response in call:
            now_us = time.monotonic_ns() // 1000
            seen.ages_us.extend(age_us(token_id, now_us) for token_id in response.delta.token_ids)

    async with grpc.aio.insecure_channel(fleet.gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await read(stub.Generate(request))
        seen.ages_us.clear()
        before = {kind: fleet.cpu_s(kind) for kind in WAYS}
        await asyncio.gather(*(read(stub.Generate(request)) for _ in range(num_streams)))
        tokens = len(seen.ages_us)
        seen.cpu_us = {kind: (fleet.cpu_s(kind) - before[kind]) / tokens * 1e6 for kind in WAYS}
    return seen


if __name__ == "__main__":
    main()
