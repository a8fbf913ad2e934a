"""The gateway as a process: it says where it is, stays small, and stops within its bound when told to."""

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

import psutil

import services
from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.ids import fleet_address
from services.common.store.gateways import GatewayLease
from services.gateway.gateway import Addresses
from tests.contract.gateway_fleet import Answer, Fleet, RunningGateway

REPOSITORY = Path(services.__path__[0]).parent
MOST_BYTES = 150 * 1024 * 1024


async def started_gateway(fleet: Fleet, *flags: str) -> tuple[asyncio.subprocess.Process, dict[str, str]]:
    arguments = ("-m", "services.gateway", "--redis-url", fleet.url, "--pool", fleet.pool)
    tokenizers = ("--tokenizers", fleet.tokenizer_address)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        *tokenizers,
        *flags,
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    async with asyncio.timeout(30):
        return process, json.loads(await process.stdout.readline())


async def test_a_terminated_gateway_ends_its_streams_writes_that_they_left_and_exits_well(fleet: Fleet) -> None:
    process, announced = await started_gateway(fleet, "--drain-ms", "100")
    assert announced["kind"] == "gateway"
    assert int(announced["pid"]) == process.pid
    async with rpc.channel(announced["address"]) as channel:
        gateway = RunningGateway(
            Addresses(
                announced["address"],
                announced["http_address"],
                announced["fleet_address"],
                {},
            ),
            asyncio.Event(),
            asyncio.ensure_future(_nothing()),
            channel,
        )
        started = await fleet.started(gateway)
        await started.send(0, "ab")
        await started.answer.until_text("ab")
        assert psutil.Process(process.pid).memory_info().rss < MOST_BYTES
        process.send_signal(signal.SIGTERM)
        assert (await started.answer.error()).reason == "DRAINING"
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    assert (await fleet.record(started.key)).reader_left_at_ms


async def test_a_gateway_started_anew_at_the_same_address_does_not_stand_for_the_one_that_died(fleet: Fleet) -> None:
    process, announced = await started_gateway(fleet)
    request_id = await _accepted(announced["address"])
    died = (await fleet.record(fleet.key(request_id))).gateway
    process.kill()
    await process.wait()
    process, again = await started_gateway(fleet, "--fleet-listen", announced["fleet_address"])
    lives = (await fleet.record(fleet.key(await _accepted(again["address"])))).gateway
    assert fleet_address(lives) == fleet_address(died) == announced["fleet_address"]
    async with asyncio.timeout(15):
        while await GatewayLease(fleet.redis).alive([died, lives]) != [False, True]:
            await asyncio.sleep(0.05)
    process.kill()
    await process.wait()


async def _accepted(address: str) -> str:
    async with rpc.channel(address) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        return await Answer(stub.Generate(pb.GenerateRequest(prompt="hello"))).accepted()


async def _nothing() -> None:
    pass


async def test_a_taken_port_of_http_is_told(fleet: Fleet) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--redis-url", fleet.url, "--pool", fleet.pool, "--tokenizers", fleet.tokenizer_address)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.gateway", "--http-listen", listen, *flags),
            cwd=REPOSITORY,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().splitlines()[-1].startswith(f"gateway: can't listen on {listen}")


async def test_the_gateway_imports_no_torch() -> None:
    code = "import sys, services.gateway.__main__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=REPOSITORY)
    assert await process.wait() == 0


async def test_a_gateway_that_cannot_start_says_why_and_what_to_do() -> None:
    for flags, words in (
        ((), "--tokenizers"),
        (("--tokenizers", " , "), "--tokenizers"),
        (("--tokenizers", "127.0.0.1:1", "--backlog-limit", "0"), "--backlog-limit"),
        (("--tokenizers", "127.0.0.1:1", "--redis-url", "redis://127.0.0.1:1", "--start-limit-ms", "0"), "Redis"),
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway", *flags, cwd=REPOSITORY, stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
        assert process.returncode
        assert words in errors.decode().splitlines()[-1]
