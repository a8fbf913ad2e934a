"""KEDA's own client learns from real scheduler processes how many workers are wanted, and never zero by mistake."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis.asyncio import Redis

from gen.keda import externalscaler_pb2 as keda
from gen.keda import externalscaler_pb2_grpc
from services.common.errors import from_rpc
from services.common.store.connection import command
from services.common.store.keys import Keys
from services.scheduler.external_scaler import STALE_MS
from tests.conftest import RedisServer
from tests.contract.scheduler_pool import scheduler_pool

REF = keda.ScaledObjectRef(name="shoal-worker", namespace="default", scalerMetadata={"scalerAddress": "any"})
WITHIN_S = 20.0
FLAGS = (
    "--min-workers", "0", "--max-workers", "4", "--quiet-ms", "1000", "--demand-look-ms", "50",
    "--lease-ttl-ms", "600", "--lease-renew-ms", "100", "--recovery-fresh-ms", "0",
)  # fmt: skip


@dataclass
class Scheduler:
    process: asyncio.subprocess.Process
    address: str

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


@dataclass
class Schedulers:
    """Real processes, and KEDA's client of each."""

    url: str
    pool: str
    running: list[Scheduler] = field(default_factory=list)
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    async def start(self) -> Scheduler:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.scheduler", "--redis-url", self.url, "--pool", self.pool, *FLAGS,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        announced = json.loads(await process.stdout.readline())
        self.running.append(Scheduler(process, announced["address"]))
        return self.running[-1]

    def client(self, scheduler: Scheduler) -> "externalscaler_pb2_grpc.ExternalScalerAsyncStub":
        self.channels.append(grpc.aio.insecure_channel(scheduler.address))
        stub: externalscaler_pb2_grpc.ExternalScalerAsyncStub = externalscaler_pb2_grpc.ExternalScalerStub(
            self.channels[-1]
        )
        return stub


@asynccontextmanager
async def schedulers(redis_server: RedisServer, pool: str) -> AsyncIterator[Schedulers]:
    parts = Schedulers(redis_server.url, pool)
    try:
        yield parts
    finally:
        for channel in parts.channels:
            await channel.close(None)
        for scheduler in parts.running:
            scheduler.kill()
            await scheduler.process.wait()


async def wanted(client: "externalscaler_pb2_grpc.ExternalScalerAsyncStub", condition: Callable[[int], bool]) -> int:
    """The metric once the condition holds of it; while nobody has led the pool there is none."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                request = keda.GetMetricsRequest(scaledObjectRef=REF, metricName="shoal_workers_wanted")
                (value,) = (await client.GetMetrics(request, timeout=5)).metricValues
                if condition(value.metricValue):
                    assert value.metricValueFloat == value.metricValue
                    return int(value.metricValue)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.02)


async def test_a_request_without_workers_activates_the_pool_and_quiet_puts_it_back_to_zero(
    redis_server: RedisServer, redis: Redis, pool: str
) -> None:
    async with schedulers(redis_server, pool) as processes, scheduler_pool(redis, pool) as parts:
        client = processes.client(await processes.start())
        assert await wanted(client, lambda number: number == 0) == 0
        assert not (await client.IsActive(REF)).result
        stream: Any = client.StreamIsActive(REF)
        assert not (await stream.read()).result
        (spec,) = (await client.GetMetricSpec(REF)).metricSpecs
        assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == ("shoal_workers_wanted", 1, 1)

        await parts.submit("r1")
        async with asyncio.timeout(WITHIN_S):
            assert (await stream.read()).result, "told without being asked"
        assert await wanted(client, lambda number: number > 0) == 1
        assert (await client.IsActive(REF)).result

        worker = await parts.a_worker()
        await worker.finish(await worker.next_start())
        async with asyncio.timeout(WITHIN_S):
            assert not (await stream.read()).result
        stream.cancel()


async def test_a_follower_answers_as_the_leader_does_and_goes_on_when_it_is_killed(
    redis_server: RedisServer, redis: Redis, pool: str
) -> None:
    async with schedulers(redis_server, pool) as processes, scheduler_pool(redis, pool) as parts:
        first, second = await processes.start(), await processes.start()
        await parts.submit("r1")
        leads = processes.client(first), processes.client(second)
        for client in leads:
            assert await wanted(client, lambda number: number > 0) == 1
        first.kill()
        await first.process.wait()
        for _ in range(50):
            assert await wanted(leads[1], lambda number: True) == 1, "not once less, over the change of leaders"
            await asyncio.sleep(0.04)


async def test_a_word_that_is_too_old_is_an_error_and_not_a_number(
    redis_server: RedisServer, redis: Redis, pool: str
) -> None:
    async with schedulers(redis_server, pool) as processes:
        scheduler = await processes.start()
        client = processes.client(scheduler)
        await wanted(client, lambda number: number == 0)
        holder = await command(redis, "GET", Keys(pool).leader)
        # Somebody else leads, and says nothing: this process may only follow.
        await command(redis, "SET", Keys(pool).leader, "99:somebody", "PX", 60_000)
        assert holder
        await command(redis, "HSET", Keys(pool).demand, "at_ms", 1)
        for call in (
            client.IsActive(REF),
            client.GetMetrics(keda.GetMetricsRequest()),
            client.StreamIsActive(REF).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            error = from_rpc(raised.value)
            assert (raised.value.code(), error.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_LEADER")
            assert "old" in error.message
        assert STALE_MS < 60_000


async def test_an_unknown_metric_is_refused_and_the_service_is_found_by_reflection(
    redis_server: RedisServer, redis: Redis, pool: str
) -> None:
    async with schedulers(redis_server, pool) as processes:
        scheduler = await processes.start()
        client = processes.client(scheduler)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.GetMetrics(keda.GetMetricsRequest(metricName="s0-something"))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        reflection = reflection_pb2_grpc.ServerReflectionStub(processes.channels[0])
        asked = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await asked.read()
        assert "externalscaler.ExternalScaler" in [service.name for service in answer.list_services_response.service]
        scheduler.process.send_signal(signal.SIGTERM)
        assert await scheduler.process.wait() == 0
