"""Real gateways on a real Redis; a tokenizer of one token a character; a leader and a worker moved by the test."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import grpc
from redis.asyncio import Redis

from gen.shoal.fleet.v1 import delivery_pb2, delivery_pb2_grpc, request_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.errors import InvalidRequest, ShoalError, from_rpc
from services.common.ids import RequestKey, WorkerId, new_nonce, request_key
from services.common.record import moves
from services.common.record.record import Attempt, Record
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.connection import command
from services.common.store.events import Events
from services.common.store.keys import Keys
from services.common.store.requests import RequestStore
from services.common.store.workers import WorkerDirectory
from services.common.tls.credentials import fleet_server_credentials
from services.common.tls.options import FleetTls
from services.gateway.config import GatewayConfig
from services.gateway.endings import STATES
from services.gateway.gateway import Addresses, run
from tests.contract.builders import a_leader

WITHIN_S = 10.0
CONTEXT_TOKENS = 2_000
VOCABULARY_TOKENS = 1_000
END_TOKEN = 1


def _encoded(request: tokenizer_pb2.EncodeRequest) -> tokenizer_pb2.EncodeResponse:
    text = request.prompt or "".join(f"{each.role}:{each.content}" for each in request.chat.messages)
    return tokenizer_pb2.EncodeResponse(token_ids=[ord(character) for character in text])


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """A token is a character. A stop text is ignored; it is the real tokenizer's."""

    def __init__(self) -> None:
        self.refuses = 0
        """How many of the next calls find it away."""
        self.checked: list[pb.ResponseFormat] = []
        """Forms that it was asked about. It refuses the regex "[", as the real one does."""
        self.num_encoded = 0
        """Inputs, so far."""
        self.num_waiting = 0
        """Calls that are held now."""
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    def hold(self) -> None:
        """Encode nothing until `let_go`."""
        self._goes_on.clear()

    def let_go(self) -> None:
        self._goes_on.set()

    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> tokenizer_pb2.EncodeResponse:  # noqa: N802
        await self._maybe_refuse(context)
        await self._until_let_go()
        self.num_encoded += 1
        return _encoded(request)

    async def EncodeAll(  # noqa: N802
        self, request: tokenizer_pb2.EncodeAllRequest, context: Any
    ) -> tokenizer_pb2.EncodeAllResponse:
        await self._maybe_refuse(context)
        await self._until_let_go()
        self.num_encoded += len(request.inputs)
        asked = [tokenizer_pb2.EncodeRequest.FromString(each) for each in request.inputs]
        results = [tokenizer_pb2.Encoded(response=_encoded(each).SerializeToString()) for each in asked]
        return tokenizer_pb2.EncodeAllResponse(results=results)

    async def Decode(self, request: tokenizer_pb2.DecodeRequest, context: Any) -> tokenizer_pb2.DecodeResponse:  # noqa: N802
        await self._maybe_refuse(context)
        shown = request.token_ids[: len(request.token_ids) - request.last_token_hidden]
        return tokenizer_pb2.DecodeResponse(text=text_of(shown[request.from_index :]))

    async def Spell(self, request: tokenizer_pb2.SpellRequest, context: Any) -> tokenizer_pb2.SpellResponse:  # noqa: N802
        await self._maybe_refuse(context)
        return tokenizer_pb2.SpellResponse(spellings=[chr(token).encode() for token in request.token_ids])

    async def CheckFormat(  # noqa: N802
        self, request: tokenizer_pb2.CheckFormatRequest, context: Any
    ) -> tokenizer_pb2.CheckFormatResponse:
        self.checked.append(request.response_format)
        if request.response_format.regex == "[":
            field = "response_format.regex"
            raise InvalidRequest(f"{field}: unclosed character class", reason="INVALID_INPUT", field=field)
        return tokenizer_pb2.CheckFormatResponse()

    async def Describe(self, request: tokenizer_pb2.DescribeRequest, context: Any) -> tokenizer_pb2.DescribeResponse:  # noqa: N802
        return tokenizer_pb2.DescribeResponse(
            model="fake",
            context_tokens=CONTEXT_TOKENS,
            vocabulary_tokens=VOCABULARY_TOKENS,
            end_token_ids=[END_TOKEN],
        )

    async def _until_let_go(self) -> None:
        self.num_waiting += 1
        try:
            await self._goes_on.wait()
        finally:
            self.num_waiting -= 1

    async def _maybe_refuse(self, context: Any) -> None:
        if self.refuses:
            self.refuses -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")


def bearer(api_key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {api_key}")]


def text_of(tokens: Sequence[int]) -> str:
    return "".join(chr(token) for token in tokens)


def tokens_of(text: str) -> list[int]:
    return [ord(character) for character in text]


@dataclass
class RunningGateway:
    """A gateway in this process, and a client's channel to it."""

    addresses: Addresses
    stop: asyncio.Event
    ended: "asyncio.Task[None]"
    channel: grpc.aio.Channel

    @property
    def fleet_address(self) -> str:
        return self.addresses.fleet

    @property
    def stub(self) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return stub

    def generate(self, tenant: str = "", timeout_s: float | None = None, api_key: str = "", **fields: Any) -> "Answer":
        if not {"prompt", "chat", "token_ids"} & set(fields):
            fields["prompt"] = "hello"
        metadata = [("x-shoal-tenant", tenant)] if tenant else []
        metadata += bearer(api_key) if api_key else []
        return Answer(self.stub.Generate(pb.GenerateRequest(**fields), metadata=metadata, timeout=timeout_s))

    def attach(self, request_id: str, from_index: int = 0, held: str = "", tenant: str = "") -> "Answer":
        metadata = [("x-shoal-tenant", tenant)] if tenant else []
        request = pb.AttachRequest(request_id=request_id, from_index=from_index, held_token_ids=tokens_of(held))
        return Answer(self.stub.Attach(request, metadata=metadata))


class Answer:
    """A client's stream: what came so far."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.text = ""
        self.tokens: list[int] = []
        self.num_deltas = 0
        self.from_index: int | None = None
        self.request_id = ""
        self.finished: pb.Finished | None = None

    async def accepted(self) -> str:
        """Read up to `accepted`; returns the request's id. Raises the ShoalError instead."""
        await self._next()
        assert self.request_id
        return self.request_id

    async def until_text(self, text: str) -> None:
        """Read until this text has come."""
        while self.text != text:
            assert text.startswith(self.text), (self.text, text)
            assert await self._next(), f"the stream ended at {self.text!r}"

    async def end(self) -> pb.Finished:
        """Read to the end. Raises the ShoalError that ended the stream instead."""
        while await self._next():
            pass
        assert self.finished is not None
        return self.finished

    async def error(self) -> ShoalError:
        """Read to the error that ends the stream."""
        try:
            await self.end()
        except ShoalError as error:
            return error
        raise AssertionError("the stream ended well")

    async def _next(self) -> bool:
        try:
            async with asyncio.timeout(WITHIN_S):
                response = await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error
        if not isinstance(response, pb.GenerateResponse):  # EOF
            return False
        match response.WhichOneof("event"):
            case "accepted":
                assert not self.request_id, "accepted comes once, and first"
                self.request_id = response.accepted.request_id
            case "delta":
                self._take(response.delta)
            case "finished":
                assert self.finished is None
                self.finished = response.finished
        return True

    def _take(self, delta: pb.Delta) -> None:
        assert self.request_id
        assert self.finished is None
        if self.from_index is None:
            self.from_index = delta.index
        assert delta.index == self.from_index + len(self.tokens), "indices are contiguous"
        self.tokens.extend(delta.token_ids)
        self.text += delta.text
        self.num_deltas += 1


class FakeWorker:
    """One worker's stream to one gateway, message by message."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def open(
        self, key: RequestKey, attempt: Attempt, reader: int = 1, worker: str = "fake"
    ) -> delivery_pb2.DeliverResponse:
        """Ask to send; returns the answer."""
        await self.ask(key, attempt, reader, worker)
        return await self.answer()

    async def ask(self, key: RequestKey, attempt: Attempt, reader: int = 1, worker: str = "fake") -> None:
        wish = delivery_pb2.Open(key=key, attempt=_attempt_id(attempt), reader=reader)
        await self.call.write(delivery_pb2.DeliverRequest(worker_id=worker, opens=[wish]))

    async def answer(self) -> delivery_pb2.DeliverResponse:
        async with asyncio.timeout(WITHIN_S):
            response: delivery_pb2.DeliverResponse = await self.call.read()
        return response

    async def send(self, key: RequestKey, attempt: Attempt, index: int, text: str) -> None:
        """One frame of as many tokens as characters."""
        await self.call.write(delivery_pb2.DeliverRequest(frames=[frame(key, attempt, index, text)]))

    async def end(
        self, key: RequestKey, attempt: Attempt, state: RequestState, num_tokens: int, error: str = ""
    ) -> None:
        usage = pb.Usage(prompt_tokens=5, completion_tokens=num_tokens)
        finished = pb.Finished(reason=pb.FINISH_REASON_STOP, usage=usage)
        end = delivery_pb2.EndFrame(
            key=key, attempt=_attempt_id(attempt), state=STATES[state], finished=finished, error=error
        )
        await self.call.write(delivery_pb2.DeliverRequest(ends=[end]))

    async def close(self, key: RequestKey, reader: int) -> None:
        await self.call.write(delivery_pb2.DeliverRequest(closes=[delivery_pb2.CloseFrame(key=key, reader=reader)]))


class Fleet:
    """The neighbours of gateways, and gateways."""

    def __init__(self, redis: Redis, url: str, pool: str, tls: FleetTls | None = None) -> None:
        """`tls`: between the services; None: they speak in plain."""
        self.redis = redis
        self.tls = tls
        self.url = url
        self.pool = pool
        self.store = RequestStore(redis, pool, retention_ms=60_000)
        self.directory = WorkerDirectory(redis, pool)
        self.worker = WorkerId("fake")
        self.tokenizer = FakeTokenizer()
        self.fence = ""
        self.gateways: list[RunningGateway] = []
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> "Fleet":
        server = rpc.Server([], credentials=fleet_server_credentials(self.tls))
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self.tokenizer, server.grpc)
        self.tokenizer_address = await server.start("127.0.0.1:0")
        self._resources.push_async_callback(server.stop, 0)
        await self.lead()
        await self.register(num_blocks=1_000)
        return self

    async def __aexit__(self, *_: object) -> None:
        # The tokenizer and links end after the gateways: these are still served while they drain.
        for gateway in self.gateways:
            gateway.stop.set()
        await asyncio.gather(*(gateway.ended for gateway in self.gateways))
        await self._resources.aclose()

    async def lead(self) -> None:
        self.fence = (await a_leader(self.redis, self.pool, ttl_ms=60_000)).fence

    async def register(self, num_blocks: int) -> None:
        info = request_pb2.WorkerInfo(
            worker_id=self.worker, num_blocks=num_blocks, block_size_tokens=16, context_tokens=CONTEXT_TOKENS
        )
        await self.directory.register(info, 60_000)

    async def gateway(self, **fields: Any) -> RunningGateway:
        """Start a gateway in this process."""
        config = GatewayConfig(tokenizers=self.tokenizer_address, redis_url=self.url, pool=self.pool, drain_ms=0)
        if self.tls:
            files = self.tls.files
            config = replace(
                config, tls_ca=str(files.ca), tls_certificate=str(files.certificate), tls_key=str(files.key)
            )
        ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        serving = run(replace(config, **fields), stop, ready.set_result)
        ended = asyncio.create_task(serving)
        await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await ended
        addresses = ready.result()
        channel = await self._resources.enter_async_context(rpc.channel(addresses.public, self.tls))
        gateway = RunningGateway(addresses, stop, ended, channel)
        self.gateways.append(gateway)
        return gateway

    async def link(self, gateway: RunningGateway) -> FakeWorker:
        """Dial a gateway as a worker does."""
        channel = await self._resources.enter_async_context(rpc.channel(gateway.fleet_address, self.tls))
        stub: delivery_pb2_grpc.DeliveryServiceAsyncStub = delivery_pb2_grpc.DeliveryServiceStub(channel)
        call: Any = stub.Deliver()  # type: ignore[call-arg]  # without an iterator it is written to
        self._resources.callback(call.cancel)
        return FakeWorker(call)

    def key(self, request_id: str, tenant: str = "default") -> RequestKey:
        return request_key(tenant, request_id)

    async def place(self, key: RequestKey) -> Attempt:
        """As the leader: onto the fake worker. Returns the attempt."""
        attempt = (await self.record(key)).attempt
        answer = await self.store.place(moves.Place(key, self.fence, attempt, self.worker))
        assert answer.verdict == Verdict.OK
        return attempt

    async def requeue(self, key: RequestKey) -> None:
        attempt = (await self.record(key)).attempt
        move = moves.Requeue(key, attempt, new_nonce(), "test", self.fence)
        assert (await self.store.requeue(move)).verdict == Verdict.OK

    async def finish(
        self, key: RequestKey, attempt: Attempt, text: str, state: RequestState = RequestState.FINISHED, error: str = ""
    ) -> None:
        """As the worker: store the end, without telling the gateway."""
        outcome = request_pb2.Outcome(
            reasons=[pb.FINISH_REASON_STOP],
            usage=pb.Usage(prompt_tokens=5, completion_tokens=len(text)),
            last_token_hidden=[False],
        )
        tails = ((0, tuple(tokens_of(text))),)
        move = moves.Finish(key, attempt, state, tails, outcome.SerializeToString(), error)
        assert (await self.store.finish(move)).verdict == Verdict.OK

    async def record(self, key: RequestKey) -> Record:
        found = await self.store.read(key)
        assert found, f"no record of {key}"
        return found[0]

    async def rewrite(self, key: RequestKey, gateway: str, reader: int) -> None:
        """Let Redis have another reader, as when it lost its last writes."""
        await self.redis.hset(Keys(self.pool).request(key), mapping={"gateway": gateway, "reader": reader})

    async def links_broken(self) -> list[str]:
        """Workers whose streams the leader was told to be broken, in order."""
        events = await Events(self.redis, self.pool).newest(100)
        return [event.worker_id for _, event in events if isinstance(event, request_pb2.LinkBroken)]

    async def record_until(self, key: RequestKey, condition: Callable[[Record], bool]) -> Record:
        """The record once the condition holds of it."""
        async with asyncio.timeout(WITHIN_S):
            while not condition(record := await self.record(key)):
                await asyncio.sleep(0.01)
        return record

    async def started(self, gateway: RunningGateway, **fields: Any) -> "Started":
        """A request that was accepted, placed and opened on the fake worker's link to its gateway."""
        answer = gateway.generate(**fields)
        key = self.key(await answer.accepted(), fields.get("tenant") or "default")
        opened = await self.opened(gateway, key)
        return Started(opened.key, opened.attempt, opened.worker, answer)

    async def opened(self, gateway: RunningGateway, key: RequestKey) -> "Opened":
        """An accepted request, placed and opened on the fake worker's link to this gateway."""
        attempt = await self.place(key)
        worker = await self.link(gateway)
        response = await worker.open(key, attempt)
        assert len(response.resumes) == 1
        return Opened(key, attempt, worker)

    async def stored(self, key: RequestKey) -> None:
        """Wait until a request is accepted."""
        async with asyncio.timeout(WITHIN_S):
            while await self.store.read(key) is None:
                await asyncio.sleep(0.01)

    async def only_key(self) -> RequestKey:
        """The key of the pool's only request, once there is one."""
        prefix = Keys(self.pool).request(RequestKey(""))
        async with asyncio.timeout(WITHIN_S):
            while not (names := await command(self.redis, "KEYS", f"{prefix}*")):
                await asyncio.sleep(0.01)
        (name,) = names
        return RequestKey(str(name, "utf-8").removeprefix(prefix))


@dataclass
class Opened:
    """A request on the fake worker."""

    key: RequestKey
    attempt: Attempt
    worker: FakeWorker

    @property
    def request_id(self) -> str:
        return self.key.partition("/")[2]

    async def send(self, index: int, text: str) -> None:
        await self.worker.send(self.key, self.attempt, index, text)

    async def end(self, num_tokens: int) -> None:
        """Tell a good end."""
        await self.worker.end(self.key, self.attempt, RequestState.FINISHED, num_tokens)


@dataclass
class Started(Opened):
    """The same, and its client's stream."""

    answer: Answer


def frame(
    key: RequestKey, attempt: Attempt, index: int, text: str, tokens: Sequence[int] | None = None
) -> delivery_pb2.TokenFrame:
    """Of as many tokens as characters, or of these."""
    delta = pb.Delta(index=index, text=text, token_ids=tokens_of(text) if tokens is None else tokens)
    return delivery_pb2.TokenFrame(key=key, attempt=_attempt_id(attempt), delta=delta)


def _attempt_id(attempt: Attempt) -> delivery_pb2.AttemptId:
    return delivery_pb2.AttemptId(number=attempt.number, nonce=attempt.nonce)
