"""Bare servers, which do nothing but refuse: the least that gRPC and HTTP take in Python."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any

import grpc
import uvloop
from aiohttp import web
from grpc_status import rpc_status

from benchmarks.flood.clients import SPAWN, Listening
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common import rpc
from services.common.errors import to_status
from services.gateway.admission import backlog_full
from services.gateway.config import GatewayConfig
from services.gateway.http.errors import error_response
from services.gateway.http.server import MAX_WAITING_CONNECTIONS
from services.gateway.server import SERVICE_NAME

COMPLETIONS = "/v1/completions"
REFUSAL = backlog_full(500, 500)
Serve = Callable[[Callable[[str], None]], Coroutine[Any, Any, None]]
"""Serves for ever; tells its address."""


@contextmanager
def bare_server(serve: Serve) -> Iterator[Listening]:
    """A server in a process of its own."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=run, args=(serve, theirs), daemon=True)
    process.start()
    try:
        yield Listening(ours.recv(), process.pid or 0)
    finally:
        process.terminate()
        process.join()


def run(serve: Serve, address: Pipe) -> None:
    """The process."""
    uvloop.run(serve(address.send))


async def serve_grpc(tell: Callable[[str], None]) -> None:
    """grpc.aio, with the gateway's options."""
    status = rpc_status.to_status(to_status(REFUSAL))

    async def refuse(request: pb.GenerateRequest, context: Any) -> None:
        await context.abort_with_status(status)

    handlers = {
        "Generate": grpc.unary_stream_rpc_method_handler(refuse, request_deserializer=pb.GenerateRequest.FromString)
    }
    server = grpc.aio.server(options=[*rpc.SERVER_OPTIONS, *GatewayConfig(tokenizers="").client_options()])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tell(f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def serve_http(tell: Callable[[str], None]) -> None:
    """aiohttp."""

    async def refuse(request: web.Request) -> web.Response:
        await request.read()
        return error_response(REFUSAL)

    application = web.Application()
    application.add_routes([web.post(COMPLETIONS, refuse)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=MAX_WAITING_CONNECTIONS).start()
    tell(f"127.0.0.1:{runner.addresses[0][1]}")
    await asyncio.Event().wait()
