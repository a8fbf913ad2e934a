"""Health by name: whether a service is to be sent work, and whether it lives at all."""

import asyncio
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common import rpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(address: str, name: str) -> int:
    async with rpc.channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        return int(answer.status)


async def test_a_service_that_takes_no_work_lives() -> None:
    server = rpc.Server(["some.Service"])
    address = await server.start("127.0.0.1:0")
    await server.set_serving(False)
    try:
        assert await health_of(address, "") == NOT_SERVING
        assert await health_of(address, "some.Service") == NOT_SERVING
        assert await health_of(address, "live") == SERVING
    finally:
        await server.stop(0)


async def test_health_is_watched() -> None:
    """As a client's load balancer does that was told to mind health."""
    server = rpc.Server(["some.Service"])
    address = await server.start("127.0.0.1:0")
    await server.set_serving(True)
    async with rpc.channel(address) as channel, asyncio.timeout(10):
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="some.Service"))
        assert (await watched.read()).status == SERVING
        await server.set_serving(False)
        assert (await watched.read()).status == NOT_SERVING
    await server.stop(0)


@pytest.fixture
async def servers() -> list[rpc.Server]:
    return [rpc.Server([]), rpc.Server(["only.second"])]


async def test_calls_go_to_every_process_behind_a_name(servers: list[rpc.Server]) -> None:
    """As with a headless service: one name, several addresses. Only the second server knows the name that is asked."""
    addresses = [await server.start("127.0.0.1:0") for server in servers]
    answers: set[grpc.StatusCode] = set()
    async with rpc.channel(f"ipv4:{','.join(addresses)}") as channel, asyncio.timeout(20):
        while answers != {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}:
            call = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="only.second"), timeout=5, wait_for_ready=True
            )
            answers.add(await call.code())
    for server in servers:
        await server.stop(0)


STARTS_PROGRAMS = """
import asyncio
from services.common.rpc import Server

async def main():
    server = Server([])
    await server.start("127.0.0.1:0")
    for _ in range(3):
        await (await asyncio.create_subprocess_exec("true", preexec_fn=int)).wait()
    await server.stop(0)

asyncio.run(main())
"""


def test_nothing_is_said_of_forks_when_a_process_with_a_server_starts_programs() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS_PROGRAMS], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
