"""How soon a full gateway refuses: `python -m benchmarks.flood --clients 2000`.

A fleet with a backlog limit of 500 is asked by 2,000 clients at once, from processes that are connected beforehand. The
same clients then ask as many bare grpc.aio servers that refuse every call at once with the same details: the least that
gRPC for Python takes. A refusal's time is the client's, from its own call to its error. A process refuses few thousand
calls a second: on a machine of many cores, give it gateways and client processes (`--gateways 6 --processes 6`).
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import grpc
import psutil
from grpc_status import rpc_status

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.errors import Exhausted, to_status
from services.gateway.config import GatewayConfig

ANSWER_LIMIT_S = 300.0
# spawn: gRPC does not survive a fork.
SPAWN = multiprocessing.get_context("spawn")


class Listening(NamedTuple):
    """A server's process."""

    address: str
    pid: int


class Flood(NamedTuple):
    """What the clients saw."""

    refused_ms: list[float]
    num_served: int
    first_sent_s: float
    last_sent_s: float
    server_cpu_s: float


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4, help="of clients")
    parser.add_argument("--model", default="", help="instead of the default model: a GGUF file or a folder")
    parser.add_argument("--over-s", type=float, default=0.0, help="seconds over which they come, instead of at once")
    options = parser.parse_args()
    with ExitStack() as stack:
        bare = [stack.enter_context(bare_server()) for _ in range(options.gateways)]
        report("bare grpc.aio", flood(bare, options.processes, options.clients, options.over_s))
    with fleet(options.gateways, options.model) as gateways:
        report("gateways", flood(gateways, options.processes, options.clients, options.over_s))


def report(name: str, seen: Flood) -> None:
    """One line."""
    refused = sorted(seen.refused_ms)
    p50, p99 = (refused[int(share * (len(refused) - 1))] for share in (0.5, 0.99))
    within = sum(took_ms <= 100 for took_ms in refused) / len(refused)
    print(
        f"{name}: {len(refused)} refused, {seen.num_served} served; sent over "
        f"{(seen.last_sent_s - seen.first_sent_s) * 1000:.0f} ms; refused after p50 {p50:.0f}, p99 {p99:.0f}, "
        f"longest {refused[-1]:.0f} ms, {within:.0%} within 100 ms; until the last refusal the server took "
        f"{seen.server_cpu_s / len(refused) * 1e6:.0f} us of processor a refusal",
        flush=True,
    )


def flood(servers: Sequence[Listening], num_processes: int, num_clients: int, over_s: float) -> Flood:
    """Ask at once, or evenly over a time; wait for every answer. Each process of clients asks one of the servers."""
    start = SPAWN.Barrier(num_processes + 1)
    pipes = [SPAWN.Pipe() for _ in range(num_processes)]
    share = num_clients // num_processes
    clients = [
        SPAWN.Process(target=ask_all, args=(server.address, share, over_s, start, theirs), daemon=True)
        for server, (_, theirs) in zip(itertools.cycle(servers), pipes)
    ]
    for client in clients:
        client.start()
    start.wait()
    before_s = processor_s(servers)
    for ours, _ in pipes:
        ours.recv()
    after_s = processor_s(servers)
    seen: list[tuple[list[float], int, float, float]] = [ours.recv() for ours, _ in pipes]
    return Flood(
        refused_ms=[took_ms for refused_ms, *_ in seen for took_ms in refused_ms],
        num_served=sum(num_served for _, num_served, *_ in seen),
        first_sent_s=min(first for *_, first, _ in seen),
        last_sent_s=max(last for *_, last in seen),
        server_cpu_s=after_s - before_s,
    )


def processor_s(servers: Sequence[Listening]) -> float:
    """Processor time of all of them so far."""
    times = [psutil.Process(server.pid).cpu_times() for server in servers]
    return sum(time.user + time.system for time in times)


def ask_all(address: str, number: int, over_s: float, start: Barrier, results: Connection) -> None:
    """In a process of its own: say when refusals stop coming, then what was seen."""
    asyncio.run(_ask_all(address, number, over_s, start, results))


async def _ask_all(address: str, number: int, over_s: float, start: Barrier, results: Connection) -> None:
    refused_ms: list[float] = []
    sent_s: list[float] = []
    still_open = asyncio.Semaphore(0)

    async def ask(stub: Any, delay_s: float) -> bool:
        if over_s:
            await asyncio.sleep(delay_s)
        began_s = time.monotonic()
        sent_s.append(began_s)
        accepted = False
        try:
            async for _ in stub.Generate(request, timeout=ANSWER_LIMIT_S):
                if not accepted:
                    accepted = True
                    still_open.release()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            refused_ms.append((time.monotonic() - began_s) * 1000)
            still_open.release()
            return False
        return True

    request = pb.GenerateRequest(prompt="The sea", max_tokens=1, sampling=pb.Sampling(temperature=0))
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        start.wait()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(stub, over_s * index / number)) for index in range(number)]
            for _ in range(number):
                await still_open.acquire()
            results.send(None)
        results.send((refused_ms, sum(task.result() for task in asked), min(sent_s), max(sent_s)))


@contextmanager
def fleet(num_gateways: int, model: str) -> Iterator[list[Listening]]:
    """The gateways of a fleet."""
    with tempfile.TemporaryDirectory() as state_dir:
        environment = {**os.environ, "SHOAL_STATE_DIR": state_dir}
        command = [sys.executable, "-m", "shoal.cli"]
        up = [*command, "up", "--detach", "--gateways", str(num_gateways), *(["--model", model] if model else [])]
        line = subprocess.run(up, env=environment, capture_output=True, check=True).stdout
        try:
            processes = json.loads(line)["processes"]
            yield [Listening(each["address"], each["pid"]) for each in processes if each["kind"] == "gateway"]
        finally:
            subprocess.run([*command, "down"], env=environment, check=True, capture_output=True)


@contextmanager
def bare_server() -> Iterator[Listening]:
    """A server that does nothing but refuse."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve_bare, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Listening(ours.recv(), process.pid or 0)
    finally:
        process.terminate()
        process.join()


def serve_bare(address: Connection) -> None:
    """In a process of its own."""
    import uvloop

    uvloop.run(_serve_bare(address))


async def _serve_bare(address: Connection) -> None:
    status = rpc_status.to_status(to_status(Exhausted("full", reason="BACKLOG_FULL", retry_after_ms=1000)))

    class Refusing(inference_pb2_grpc.InferenceServiceServicer):
        async def Generate(  # noqa: N802
            self, request: pb.GenerateRequest, context: Any
        ) -> AsyncIterator[pb.GenerateResponse]:
            await context.abort_with_status(status)
            yield pb.GenerateResponse()

    server = grpc.aio.server(options=[*rpc.SERVER_OPTIONS, *GatewayConfig(tokenizers="").client_options()])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address.send(f"127.0.0.1:{port}")
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
