"""Gateways that answer with made-up tokens and break their streams at random points."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import Aborted, AlreadyExists, Exhausted, NotFound, ShoalError, Unavailable
from services.common.rpc import Server

NUM_TOKENS = 40


@dataclass(slots=True)
class FakeRequest:
    payload: bytes
    tokens: Sequence[int]
    cancelled: bool = False


@dataclass(slots=True)
class FakeFleet:
    """What the gateways share. The chance to break is asked before and after each message of a stream."""

    seed: int = 1
    chance_to_break: float = 0.0
    refusals: list[ShoalError] = field(default_factory=list)
    pause_s: float = 0.0
    requests: dict[str, FakeRequest] = field(default_factory=dict)
    num_breaks: int = 0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def maybe_break(self, context: grpc.aio.ServicerContext[object, object]) -> None:
        if self.rng.random() >= self.chance_to_break:
            return
        self.num_breaks += 1
        how = self.rng.randrange(3)
        if how == 0:
            raise Unavailable("the gateway drains", reason="DRAINING")
        await context.abort((grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)[how - 1], "the line broke")


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, fleet: FakeFleet) -> None:
        self._fleet = fleet

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        if self._fleet.refusals:
            raise self._fleet.refusals.pop(0)
        await self._fleet.maybe_break(context)  # type: ignore[arg-type]
        payload = request.SerializeToString(deterministic=True)
        drawn = random.Random(request.request_id)
        tokens = [drawn.randrange(49152) for _ in range(NUM_TOKENS)]
        known = self._fleet.requests.setdefault(request.request_id, FakeRequest(payload, tokens))
        if known.payload != payload:
            raise AlreadyExists("the id is in use")
        async for response in self._answer(request.request_id, known, 0, context):
            yield response

    async def Attach(self, request: pb.AttachRequest, context: object) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        known = self._known(request.request_id)
        held = list(request.held_token_ids)
        if held != list(known.tokens[request.from_index - len(held) : request.from_index]):
            raise Aborted("histories differ", reason="DIVERGED")
        async for response in self._answer(request.request_id, known, request.from_index, context):
            yield response

    async def Cancel(self, request: pb.CancelRequest, context: object) -> pb.CancelResponse:  # noqa: N802
        self._known(request.request_id).cancelled = True
        return pb.CancelResponse(state=pb.REQUEST_STATE_RUNNING)

    async def GetRequest(self, request: pb.GetRequestRequest, context: object) -> pb.GetRequestResponse:  # noqa: N802
        self._known(request.request_id)
        decision = pb.Decision(at_ms=1, what="placed", attempt=1, detail="w-1")
        return pb.GetRequestResponse(
            request_id=request.request_id, state=pb.REQUEST_STATE_RUNNING, decisions=[decision], attempts=1
        )

    async def CountTokens(self, request: pb.CountTokensRequest, context: object) -> pb.CountTokensResponse:  # noqa: N802
        await self._fleet.maybe_break(context)  # type: ignore[arg-type]
        if request.prompt == "full":
            raise Exhausted("full", retry_after_ms=50)
        return pb.CountTokensResponse(prompt_tokens=len(request.prompt.split()) or len(request.chat.messages) * 10)

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse(models=[pb.Model(name="fake", context_tokens=64, vocabulary_tokens=49152)])

    def _known(self, request_id: str) -> FakeRequest:
        if request_id not in self._fleet.requests:
            raise NotFound(f"no request {request_id}")
        return self._fleet.requests[request_id]

    async def _answer(
        self, request_id: str, known: FakeRequest, index: int, context: object
    ) -> AsyncIterator[pb.GenerateResponse]:
        await self._fleet.maybe_break(context)  # type: ignore[arg-type]
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request_id, prompt_tokens=3))
        while index < len(known.tokens) and not known.cancelled:
            await self._fleet.maybe_break(context)  # type: ignore[arg-type]
            await asyncio.sleep(self._fleet.pause_s)
            piece = known.tokens[index : index + self._fleet.rng.randint(1, 3)]
            text = "".join(f"<{token}>" for token in piece)
            yield pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=piece))
            index += len(piece)
        await self._fleet.maybe_break(context)  # type: ignore[arg-type]
        reason = pb.FINISH_REASON_CANCELLED if known.cancelled else pb.FINISH_REASON_LENGTH
        usage = pb.Usage(prompt_tokens=3, completion_tokens=index)
        yield pb.GenerateResponse(finished=pb.Finished(reason=reason, usage=usage))


@contextmanager
def running(fleet: FakeFleet, num_gateways: int = 2) -> Iterator[str]:
    """Gateways in a thread of their own; gives their addresses."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = []
    try:
        addresses = []
        for _ in range(num_gateways):
            server, address = asyncio.run_coroutine_threadsafe(_start(fleet), loop).result(10)
            servers.append(server)
            addresses.append(address)
        yield ",".join(addresses)
    finally:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _start(fleet: FakeFleet) -> tuple[Server, str]:
    server = Server([])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeGateway(fleet), server.grpc)
    return server, await server.start("127.0.0.1:0")
