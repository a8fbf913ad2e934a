"""How soon a full gateway refuses: `python -m benchmarks.flood`.

A fleet with a backlog limit of 500 is asked by 2,000 clients at once, each on a connection of its own that is open
beforehand. Before that, the same clients ask as many bare servers (grpc.aio; with --http aiohttp) that refuse every
call at once with the same details: the least that they take. A refusal's time is the client's, from its own call to its
error. Clients are bytes on sockets and cost little, so it is the servers' time. A process refuses about 5,000 calls a
second: on a machine of many cores, give it gateways (`--gateways 8`).
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.flood.bare import COMPLETIONS, bare_server, serve_grpc, serve_http
from benchmarks.flood.clients import Flood, Listening, flood
from benchmarks.flood.connections import GrpcConnection, HttpConnection
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.gateway.server import SERVICE_NAME

GENERATE = f"/{SERVICE_NAME}/Generate"
REQUEST = pb.GenerateRequest(prompt="The sea", max_tokens=1, sampling=pb.Sampling(temperature=0))
HTTP_REQUEST = {"prompt": "The sea", "max_tokens": 1, "temperature": 0, "stream": True}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=0, help="which the clients share; 0: one for each")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="of clients")
    parser.add_argument("--http", action="store_true", help="instead of gRPC")
    parser.add_argument("--model", default="", help="instead of the default model: a GGUF file or a folder")
    parser.add_argument("--over-s", type=float, default=0.0, help="seconds over which they come, instead of at once")
    parser.add_argument("--floods", type=int, default=3, help="one after another, at the same servers")
    options = parser.parse_args()
    serve, port = (serve_http, "http_address") if options.http else (serve_grpc, "address")
    connect = (
        functools.partial(HttpConnection, path=COMPLETIONS, body=json.dumps(HTTP_REQUEST).encode())
        if options.http
        else functools.partial(GrpcConnection, path=GENERATE, message=REQUEST.SerializeToString())
    )

    def measure(name: str, servers: list[Listening]) -> None:
        num_connections = options.connections or options.clients
        for _ in range(options.floods):
            report(name, flood(servers, connect, options.processes, num_connections, options.clients, options.over_s))

    with ExitStack() as stack:
        measure("bare servers", [stack.enter_context(bare_server(serve)) for _ in range(options.gateways)])
    with fleet(options.gateways, options.model, port) as gateways:
        measure("gateways", gateways)


def report(name: str, seen: Flood) -> None:
    """One line."""
    if not seen.refused_ms:
        print(f"{name}: none refused, {seen.num_served} served", flush=True)
        return
    refused = sorted(seen.refused_ms)
    p50, p99 = (refused[int(share * (len(refused) - 1))] for share in (0.5, 0.99))
    within = sum(took_ms <= 100 for took_ms in refused) / len(refused)
    print(
        f"{name}: {len(refused)} refused, {seen.num_served} served; sent over {seen.sent_over_s * 1000:.0f} ms; "
        f"refused after p50 {p50:.0f}, p99 {p99:.0f}, longest {refused[-1]:.0f} ms, {within:.0%} within 100 ms; "
        f"until the last refusal servers took {seen.server_cpu_s / len(refused) * 1e6:.0f} us of processor a refusal, "
        f"clients {seen.client_cpu_s / len(refused) * 1e6:.0f}",
        flush=True,
    )


@contextmanager
def fleet(num_gateways: int, model: str, port: str) -> Iterator[list[Listening]]:
    """The gateways of a fleet. `port`: which of their addresses."""
    with tempfile.TemporaryDirectory() as state_dir:
        environment = {**os.environ, "SHOAL_STATE_DIR": state_dir}
        command = [sys.executable, "-m", "shoal.cli"]
        up = [*command, "up", "--detach", "--gateways", str(num_gateways), *(["--model", model] if model else [])]
        line = subprocess.run(up, env=environment, capture_output=True, check=True).stdout
        try:
            processes = json.loads(line)["processes"]
            yield [Listening(each[port], each["pid"]) for each in processes if each["kind"] == "gateway"]
        finally:
            subprocess.run([*command, "down"], env=environment, check=True, capture_output=True)


if __name__ == "__main__":
    main()
