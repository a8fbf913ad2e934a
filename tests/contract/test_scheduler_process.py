"""A scheduler as a process: it says where it is, stays small, and ends at once when told to."""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from services.common.store.leadership import Leadership
from services.common.store.recovery import Recovery
from tests.conftest import RedisServer
from tests.contract.scheduler_pool import until

MOST_BYTES = 150 * 1024 * 1024


async def test_a_scheduler_leads_answers_health_and_ends_on_sigterm(
    redis_server: RedisServer, redis: Redis, pool: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduler", "--redis-url", redis_server.url, "--pool", pool,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        announced = json.loads(await process.stdout.readline())
        assert announced["kind"] == "scheduler"
        assert announced["pid"] == process.pid
        async with grpc.aio.insecure_channel(announced["address"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await until(lambda: _is_recovered(redis, pool))
        assert _resident_bytes(process.pid) < MOST_BYTES
        assert "torch" not in _maps(process.pid)
        stopped_at = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            _, log = await process.communicate()
        assert time.perf_counter() - stopped_at < 2  # it takes 0.2 s; the rest is for a busy machine
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, log.decode()
    assert await Leadership(redis, pool, "test").holder() is None
    assert all(json.loads(line)["service"] == "scheduler" for line in log.splitlines())


async def test_a_scheduler_without_redis_says_so() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduler", "--redis-url", "redis://127.0.0.1:1",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, log = await process.communicate()
    assert process.returncode == 1
    assert b"scheduler: Redis cannot be used now" in log


async def _is_recovered(redis: Redis, pool: str) -> bool:
    return await Recovery(redis, pool).needed() is None


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")
