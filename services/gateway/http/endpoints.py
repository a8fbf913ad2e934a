"""The HTTP calls, thin: a body becomes a GenerateRequest, the core answers, and its stream becomes JSON or events."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import ShoalError
from services.gateway.admission import OpenCalls
from services.gateway.generation import Caller, Generation
from services.gateway.http import body, chat_fields, completion_fields
from services.gateway.http.chat_fields import ChatFields, chat_request
from services.gateway.http.chat_form import ChatForm
from services.gateway.http.completion_fields import CompletionFields, completion_request
from services.gateway.http.completion_form import CompletionForm
from services.gateway.http.envelope import Envelope, Wanted
from services.gateway.http.errors import CLIENT_CLOSED_REQUEST, defect, error_object, error_response, renamed
from services.gateway.http.events import EventStream
from services.gateway.http.fields import CommonFields
from services.gateway.http.form import Form
from services.gateway.http.spelling import Spelling
from services.gateway.identity import tenant_of, traceparent_of
from services.gateway.model import Model
from services.gateway.readiness import Readiness
from services.gateway.requests import Requests
from services.gateway.streams import Stream
from services.gateway.validation import check_model, check_request_id

logger = logging.getLogger(__name__)

IDEMPOTENCY_KEY = "Idempotency-Key"
REQUEST_ID = "x-request-id"
DONE = b"[DONE]"

F = TypeVar("F", bound=CommonFields)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[F]):
    """What two endpoints that generate differ in."""

    decoder: "msgspec.json.Decoder[F]"
    to_request: Callable[[F], inference_pb2.GenerateRequest]
    form: Callable[[], Form]
    names: Mapping[str, str]
    """Names in the body, by field of the proto."""


CHAT = Endpoint(msgspec.json.Decoder(ChatFields), chat_request, ChatForm, chat_fields.NAMES)
COMPLETIONS = Endpoint(
    msgspec.json.Decoder(CompletionFields), completion_request, CompletionForm, completion_fields.NAMES
)


@dataclass(frozen=True, slots=True)
class Started:
    """An accepted request, and how its answer is wanted."""

    stream: Stream
    wanted: Wanted
    in_events: bool
    resumable: bool
    """Its client chose the id, so it can come back."""


class Endpoints:
    """Handlers of the HTTP paths."""

    def __init__(
        self, model: Model, calls: OpenCalls, generation: Generation, requests: Requests, spelling: Spelling,
        readiness: Readiness, max_body_bytes: int,
    ) -> None:  # fmt: skip
        self._model = model
        self._calls = calls
        self._generation = generation
        self._requests = requests
        self._spelling = spelling
        self._readiness = readiness
        self._max_body_bytes = max_body_bytes

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, CHAT)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, COMPLETIONS)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models/{model}."""
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
                self._requests.close(started.stream)

    async def _start(self, request: web.Request, endpoint: Endpoint[F]) -> Started:
        # In a method of its own: the body is not kept while the answer is streamed.
        metadata = [(name.lower(), value) for name, value in request.headers.items()]
        caller = Caller(tenant_of(metadata), traceparent_of(metadata), lambda: None)
        fields = body.decode(await body.read(request, self._max_body_bytes), endpoint.decoder)
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
        )
        return Started(stream, wanted, bool(fields.stream), bool(asked.request_id))

    async def _answer(self, request: web.Request, endpoint: Endpoint[F], started: Started) -> web.StreamResponse:
        accepted = started.stream.accepted
        envelope = Envelope(
            endpoint.form(), accepted.request_id, self._model.name, created_s=accepted.accepted_at_ms // 1000
        )
        if started.in_events:
            return await self._in_events(request, endpoint, started, envelope)
        try:
            whole = await envelope.whole(started.stream.responses(), started.wanted, self._spelling)
        except ShoalError as error:
            return error_response(renamed(error, endpoint.names), accepted.request_id)
        except asyncio.CancelledError:
            await self._client_left(started)
            raise
        return _json_bytes(whole, headers={REQUEST_ID: accepted.request_id})

    async def _in_events(
        self, request: web.Request, endpoint: Endpoint[F], started: Started, envelope: Envelope
    ) -> web.StreamResponse:
        stream = started.stream
        try:
            events = await EventStream.begun(request, {REQUEST_ID: stream.accepted.request_id})
        except ConnectionError:
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        chunks = envelope.chunks(stream.responses(), len(stream.delivered()), started.wanted, self._spelling)
        with suppress(ConnectionError):  # The client is gone: nobody is left to be told.
            try:
                async for chunk in chunks:
                    await events.send(chunk)
                await events.send(DONE)
            except ShoalError as error:
                await events.send(msgspec.json.encode(error_object(renamed(error, endpoint.names))))
            except ConnectionError:
                raise
            except Exception as error:
                logger.error("a stream failed by a defect", exc_info=error, extra={"request": stream.key})
                await events.send(msgspec.json.encode(error_object(defect())))
            await events.end()
        return events.response

    async def _client_left(self, started: Started) -> None:
        """End a request whose only answer can't be given: nobody knows its id."""
        if started.resumable or started.stream.settled:
            return
        try:
            await self._requests.cancel(started.stream.key)
        except ShoalError as error:
            # It ends by itself when its time without a reader is over.
            logger.info("not cancelled", extra={"request": started.stream.key, "error": error.message})

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


def _json(document: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return _json_bytes(msgspec.json.encode(document), status)


def _json_bytes(
    document: bytes, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(status=status, body=document, content_type=body.JSON, headers=headers)
