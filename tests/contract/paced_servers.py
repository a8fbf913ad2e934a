"""Servers for `shoal bench` whose tokens come at known times, over gRPC and over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import Exhausted
from services.common.rpc import Server
from services.common.tls.credentials import http_context
from services.common.tls.files import Tls

FIRST_S, PAUSE_S = 0.5, 0.02


class SteppedClock:
    """Time that passes only when the server says so, and not again before the client has read it."""

    def __init__(self) -> None:
        self._now_s = 100.0
        self._read = asyncio.Event()

    def __call__(self) -> float:
        self._read.set()
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
        self._read.clear()

    async def was_read(self) -> None:
        async with asyncio.timeout(10):
            await self._read.wait()


CACHED_OF_10 = 4
"""Tokens of each prompt that are said to be found in a cache."""


@dataclass(slots=True)
class PacedServer:
    """Answers of max_tokens tokens, one call after another: the first token after FIRST_S, each further after PAUSE_S.

    `failures` are used up first, one a request: "full", "broken" (the stream ends early), "short" (a token too few).
    """

    clock: SteppedClock = field(default_factory=SteppedClock)
    failures: list[str] = field(default_factory=list)
    details: dict[str, object] = field(
        default_factory=lambda: {"prompt_tokens_details": {"cached_tokens": CACHED_OF_10}}
    )
    """What OpenAI's usage says besides."""
    asked: list[object] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def tokens(self, number: int) -> AsyncIterator[int]:
        async with self.turn:
            for index in range(number):
                self.clock.advance(PAUSE_S if index else FIRST_S)
                yield index
                await self.clock.was_read()

    def next_failure(self) -> str:
        return self.failures.pop(0) if self.failures else ""


class _Gateway(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, server: PacedServer) -> None:
        self._server = server

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        self._server.asked.append(request)
        failure = self._server.next_failure()
        if failure == "full":
            raise Exhausted("the queue is full", reason="BACKLOG_FULL")
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id))
        number = request.max_tokens - (failure == "short")
        async for index in self._server.tokens(number):
            yield pb.GenerateResponse(delta=pb.Delta(index=index, text="x", token_ids=[index]))
        if failure != "broken":
            usage = pb.Usage(completion_tokens=number, prompt_tokens=10, cached_tokens=CACHED_OF_10)
            yield pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=usage))

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse(models=[pb.Model(name="paced", context_tokens=8192, vocabulary_tokens=1000)])


@asynccontextmanager
async def paced_gateway(paced: PacedServer) -> AsyncIterator[str]:
    """Serve over gRPC; gives host:port."""
    server = Server([])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Gateway(paced), server.grpc)  # type: ignore[abstract]
    address = await server.start("127.0.0.1:0")
    try:
        yield address
    finally:
        await server.stop(0)


@asynccontextmanager
async def paced_http(paced: PacedServer, tls: Tls | None = None) -> AsyncIterator[str]:
    """Serve OpenAI's API; gives the URL. `tls`: to those who trust this certificate; None: in plain."""
    app = web.Application()
    app.router.add_get("/v1/models", _models)
    app.router.add_post(
        "/v1/completions", _endpoint(paced, lambda text, reason: {"text": text, "finish_reason": reason})
    )
    app.router.add_post(
        "/v1/chat/completions",
        _endpoint(paced, lambda text, reason: {"delta": {"content": text}, "finish_reason": reason}, opening=""),
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=http_context(tls, False) if tls else None)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"{'https' if tls else 'http'}://{host}:{port}"
    finally:
        await runner.cleanup()


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "paced"}]})


def _endpoint(
    paced: PacedServer, choice: Callable[[str, str | None], object], opening: str | None = None
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        paced.asked.append(body)
        failure = paced.next_failure()
        if failure == "full":
            return web.json_response({"error": {"message": "the queue is full"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def event(**content: object) -> None:
            await response.write(b"data: " + json.dumps(content).encode() + b"\n\n")

        if opening is not None:
            await event(choices=[choice(opening, None)])
        number = body["max_tokens"] - (failure == "short")
        async for _ in paced.tokens(number):
            await event(choices=[choice("x", None)])
        if failure != "broken":
            await event(choices=[choice("", "length")])
            await event(choices=[], usage={"completion_tokens": number, "prompt_tokens": 10, **paced.details})
            await response.write(b"data: [DONE]\n\n")
        return response

    return answer
