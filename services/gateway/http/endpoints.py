"""The HTTP calls, thin: a body becomes a GenerateRequest, the core answers, and its stream becomes JSON or events."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from gen.shoal.fleet.v1 import request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import ShoalError
from services.gateway.admission import OpenCalls
from services.gateway.authentication import Authentication
from services.gateway.generation import Caller, Generation
from services.gateway.http import body, chat_fields, completion_fields
from services.gateway.http.chat_fields import ChatFields, chat_request
from services.gateway.http.chat_form import ChatForm
from services.gateway.http.completion_fields import CompletionFields, completion_request
from services.gateway.http.completion_form import CompletionForm
from services.gateway.http.envelope import Envelope, Wanted
from services.gateway.http.errors import defect, error_object, error_response, renamed
from services.gateway.http.fields import CommonFields
from services.gateway.http.form import Form
from services.gateway.http.outgoing import Outgoing
from services.gateway.http.spelling import Spelling
from services.gateway.identity import Metadata, traceparent_of
from services.gateway.model import Model
from services.gateway.readiness import Readiness
from services.gateway.requests import Requests
from services.gateway.streams import Stream
from services.gateway.validation import check_model, check_request_id

logger = logging.getLogger(__name__)

IDEMPOTENCY_KEY = "Idempotency-Key"
REQUEST_ID = "x-request-id"
DONE = b"[DONE]"
EVENT_HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    # Nginx would collect events otherwise.
    "X-Accel-Buffering": "no",
}

F = TypeVar("F", bound=CommonFields)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[F]):
    """What two endpoints that generate differ in."""

    decoder: "msgspec.json.Decoder[F]"
    to_request: Callable[[F], inference_pb2.GenerateRequest]
    form: Callable[[str], Form]
    """For an answer that begins with this text."""
    echoes: Callable[[F], bool]
    """Whether it begins with the prompt."""
    names: Mapping[str, str]
    """Names in the body, by field of the proto."""


CHAT = Endpoint(
    msgspec.json.Decoder(ChatFields), chat_request, lambda _: ChatForm(), lambda _: False, chat_fields.NAMES
)
COMPLETIONS = Endpoint(
    msgspec.json.Decoder(CompletionFields), completion_request, CompletionForm, lambda fields: bool(fields.echo),
    completion_fields.NAMES,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Started:
    """An accepted request, and how its answer is wanted."""

    stream: Stream
    wanted: Wanted
    in_events: bool
    resumable: bool
    """Its client chose the id, so it can come back."""

    @property
    def num_choices(self) -> int:
        """Of the request."""
        return len(self.stream.delivered())


class Endpoints:
    """Handlers of the HTTP paths."""

    def __init__(
        self, model: Model, calls: OpenCalls, generation: Generation, requests: Requests, spelling: Spelling,
        readiness: Readiness, max_body_bytes: int, authentication: Authentication,
    ) -> None:  # fmt: skip
        self._model = model
        self._calls = calls
        self._generation = generation
        self._requests = requests
        self._spelling = spelling
        self._readiness = readiness
        self._bodies = body.Bodies(max_body_bytes)
        self._authentication = authentication

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, CHAT)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, COMPLETIONS)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        await self._authentication.identify(_metadata(request))
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models/{model}."""
        await self._authentication.identify(_metadata(request))
        check_model(request.match_info["model"], self._model)
        return _json(self._described())

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET /health: 200 if this gateway should be sent work, 503 if not."""
        causes = self._readiness.causes
        if causes:
            return _json({"status": "not ready", "causes": sorted(causes)}, HTTPStatus.SERVICE_UNAVAILABLE)
        return _json({"status": "ready"})

    async def _generate(self, request: web.Request, endpoint: Endpoint[F]) -> web.StreamResponse:
        with _Call() as call:
            self._calls.enter(call)
            try:
                started = await self._start(request, endpoint)
            except ShoalError as error:
                raise renamed(error, endpoint.names) from error
            try:
                return await self._answer(request, endpoint, started)
            finally:
                # A client that hangs up ends its request, as OpenAI's users expect; one with a key may send it again.
                hung_up = started.stream.end is None
                self._requests.close(started.stream, cancel=hung_up and not started.resumable)

    async def _start(self, request: web.Request, endpoint: Endpoint[F]) -> Started:
        # In a method of its own: the body is not kept while the answer is streamed.
        metadata = _metadata(request)
        caller = Caller(await self._authentication.identify(metadata), traceparent_of(metadata), lambda: None)
        with self._bodies.room() as room:
            fields = body.decode(await body.read(request, room), endpoint.decoder)
            asked = endpoint.to_request(fields)
            if IDEMPOTENCY_KEY in request.headers:
                # Checked here, for an empty one would be none to the core.
                asked.request_id = check_request_id(request.headers[IDEMPOTENCY_KEY])
            stream = await self._generation.start(asked, caller)
        options = fields.stream_options
        wanted = Wanted(
            logprobs=asked.HasField("logprobs"),
            usage=bool(options and options.include_usage),
            running_usage=bool(options and options.continuous_usage_stats),
            prompt_token_ids=_prompt_token_ids(stream) if endpoint.echoes(fields) else (),
        )
        return Started(stream, wanted, bool(fields.stream), bool(asked.request_id))

    async def _answer(self, request: web.Request, endpoint: Endpoint[F], started: Started) -> web.StreamResponse:
        accepted = started.stream.accepted
        headers = {REQUEST_ID: accepted.request_id}
        try:
            form = endpoint.form(await self._spelling.text(started.wanted.prompt_token_ids))
            envelope = Envelope(
                form, accepted.request_id, self._model.name, accepted.accepted_at_ms // 1000, self._spelling
            )
            if started.in_events:
                # An error has its place in the stream from here on.
                return await self._in_events(request, endpoint, started, envelope, headers)
            document = await envelope.whole(started.stream.responses(), started.num_choices, started.wanted)
        except ShoalError as error:
            return error_response(renamed(error, endpoint.names), accepted.request_id)
        return await self._in_one(request, document, headers)

    async def _in_events(
        self, request: web.Request, endpoint: Endpoint[F], started: Started, envelope: Envelope,
        headers: Mapping[str, str],
    ) -> web.StreamResponse:  # fmt: skip
        stream = started.stream
        outgoing = Outgoing(request, {**EVENT_HEADERS, **headers})
        with suppress(ConnectionError):  # The client is gone: nobody is left to be told.
            await outgoing.begin()
            try:
                async for chunk in envelope.chunks(stream.responses(), started.num_choices, started.wanted):
                    await outgoing.event(chunk)
                await outgoing.event(DONE)
            except ShoalError as error:
                await outgoing.event(msgspec.json.encode(error_object(renamed(error, endpoint.names))))
            except ConnectionError:
                raise
            except Exception as error:
                logger.error("a stream failed by a defect", exc_info=error, extra=stream.about())
                await outgoing.event(msgspec.json.encode(error_object(defect())))
            await outgoing.end()
        return outgoing.response

    async def _in_one(
        self, request: web.Request, document: Sequence[bytes], headers: Mapping[str, str]
    ) -> web.StreamResponse:
        length = {"Content-Type": body.JSON, "Content-Length": str(sum(map(len, document)))}
        outgoing = Outgoing(request, {**length, **headers})
        with suppress(ConnectionError):
            await outgoing.begin()
            await outgoing.document(document)
            await outgoing.end()
        return outgoing.response

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            # OpenAI's field; when a model was made is not known here.
            "created": 0,
            "owned_by": "shoal",
            "max_model_len": self._model.context_tokens,
        }


class _Call:
    """A call as OpenCalls counts it: done when its block is left."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[object], None]] = []

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self._callbacks.append(callback)

    def __enter__(self) -> "_Call":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for callback in self._callbacks:
            callback(self)


def _metadata(request: web.Request) -> Metadata:
    return [(name.lower(), value) for name, value in request.headers.items()]


def _prompt_token_ids(stream: Stream) -> Sequence[int]:
    return request_pb2.RequestPayload.FromString(stream.accepted.payload).prompt_token_ids


def _json(document: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(document), content_type=body.JSON)
