"""Many streams at once, and the gateway's processor time while all of them are open."""

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc

from benchmarks.gateway.fleet import Fleet
from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from shoal.fleet.kind import Kind

LIMIT_S = 120.0
PROMPT = "Tell me of the sea, its tides and its storms."


@dataclass(frozen=True, slots=True)
class Streamed:
    """What came while all streams were open."""

    deltas: int
    tokens: int
    gateway_cpu_s: float


@dataclass(slots=True)
class _Stream:
    deltas: int = 0
    tokens: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, call: Any) -> None:
        """Read to the end. Raises RuntimeError for a token that is missing, or out of order."""
        async for response in call:
            if response.HasField("delta"):
                delta = response.delta
                if delta.index != self.tokens:
                    raise RuntimeError(f"expected token {self.tokens}, got {delta.index}")
                self.deltas += 1
                self.tokens += len(delta.token_ids)
                self.begun.set()


async def stream_all(
    fleet: Fleet, num_streams: int, num_tokens: int, meanwhile: AbstractAsyncContextManager[None] | None = None
) -> Streamed:
    """Open streams, and count from when all have begun until the first one ends. Raises RuntimeError, gRPC's errors.

    `meanwhile` is entered when all have begun.
    """
    streams = [_Stream() for _ in range(num_streams)]
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=num_tokens, ignore_eos=True)
    async with (
        asyncio.timeout(LIMIT_S),
        grpc.aio.insecure_channel(fleet.gateway) as channel,
        asyncio.TaskGroup() as tasks,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        reading = [tasks.create_task(each.read(stub.Generate(request))) for each in streams]
        for each in streams:
            await each.begun.wait()
        before = _counted(streams, fleet)
        async with meanwhile or nullcontext():
            await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        after = _counted(streams, fleet)
    return Streamed(
        after.deltas - before.deltas, after.tokens - before.tokens, after.gateway_cpu_s - before.gateway_cpu_s
    )


async def open_idle(fleet: Fleet, num_streams: int) -> int:
    """Open streams that wait for their first token; return the gateway's resident bytes then."""
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=64)
    async with asyncio.timeout(LIMIT_S), grpc.aio.insecure_channel(fleet.gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls: list[Any] = [stub.Generate(request) for _ in range(num_streams)]
        for call in calls:
            response = await call.read()
            if not response.HasField("accepted"):
                raise RuntimeError(f"expected `accepted`, got {response}")
        return fleet.memory_bytes(Kind.GATEWAY)


def _counted(streams: list[_Stream], fleet: Fleet) -> Streamed:
    return Streamed(
        sum(each.deltas for each in streams), sum(each.tokens for each in streams), fleet.cpu_s(Kind.GATEWAY)
    )
