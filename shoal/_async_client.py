"""The client for asyncio. The same as `Client`, on the same state machine."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import NotFound, ShoalError, Unavailable, from_rpc
from services.common.tls.files import Tls
from shoal._client import CALL_LIMIT_S, DROP_LIMIT_S
from shoal._gateways import CallMetadata, aio_channel, call_metadata, parse_addresses, turns
from shoal._prompt import Message, Options, count_tokens_request, generate_request
from shoal._resumption import AttachCall, GenerateCall, Resumption
from shoal._retries import Outage, RetryPolicy
from shoal._tracing import trace_metadata
from shoal._values import (
    Choice,
    Delta,
    Finished,
    Model,
    RequestInfo,
    RequestState,
    models_of,
    request_info_of,
    state_of,
)

_Response = TypeVar("_Response")
_Call = Callable[["inference_pb2_grpc.InferenceServiceAsyncStub"], Callable[..., Awaitable[_Response]]]


class AsyncClient:
    """A fleet, through its gateways, for one event loop. Make it inside the loop; close it, or use `async with`."""

    def __init__(
        self,
        gateways: str | Sequence[str],
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        retries: RetryPolicy | None = None,
    ) -> None:
        """`gateways`: "host:port,host:port" or a list. With several, answers go on when one of them dies.

        `tls`: None: they are called in plain. `api_key`: one of `shoal keys create`.
        """
        self.gateways = parse_addresses(gateways)
        self._metadata = call_metadata(api_key)
        self._retries = retries or RetryPolicy()
        self._rng = random.Random()
        self._channels = [aio_channel(address, tls) for address in self.gateways]
        self._stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._turns = turns(len(self.gateways), self._rng.randrange(len(self.gateways)))

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> "AsyncStream":
        """Ask, and stream the answer. Give one of `prompt` (raw text), `messages` (a chat) and `token_ids`."""
        request = generate_request(prompt, messages, token_ids, options)
        call = GenerateCall(next(self._turns), request)
        return self._stream(call, options.get("traceparent"), drop_at_close="request_id" not in options)

    def attach(self, request_id: str, from_index: int = 0, held_token_ids: Sequence[int] = ()) -> "AsyncStream":
        """Go on with a request's stream at a token index. `held_token_ids`: the last tokens before it, if known."""
        request = pb.AttachRequest(request_id=request_id, from_index=from_index, held_token_ids=held_token_ids)
        return self._stream(AttachCall(next(self._turns), request), None, drop_at_close=False)

    async def cancel(self, request_id: str) -> RequestState:
        """Ask for a request's end; returns where it then stood. A running one ends within about a step."""
        response = await self._unary(lambda stub: stub.Cancel, pb.CancelRequest(request_id=request_id))
        return state_of(response.state)

    async def get_request(self, request_id: str) -> RequestInfo:
        """Where a request stands, what it used, and each decision made about it."""
        response = await self._unary(lambda stub: stub.GetRequest, pb.GetRequestRequest(request_id=request_id))
        return request_info_of(response)

    async def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        model: str = "",
    ) -> int:
        """The number of prompt tokens that `generate` would charge."""
        request = count_tokens_request(prompt, messages, model)
        return (await self._unary(lambda stub: stub.CountTokens, request)).prompt_tokens

    async def list_models(self) -> list[Model]:
        """The models that the fleet serves."""
        return models_of(await self._unary(lambda stub: stub.ListModels, pb.ListModelsRequest()))

    async def close(self) -> None:
        """Hang up. Streams that are still open end with an error."""
        for channel in self._channels:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def _stream(
        self, call: GenerateCall | AttachCall, traceparent: str | None, *, drop_at_close: bool
    ) -> "AsyncStream":
        resumption = Resumption(call, len(self._stubs), self._outage())
        metadata = (*self._metadata, *trace_metadata(traceparent))
        return AsyncStream(resumption, self._stubs, metadata, self.cancel, self._drop if drop_at_close else None)

    async def _drop(self, request_id: str) -> None:
        """Cancel what nobody will read, if that is quickly done: the fleet ends requests without a reader by itself."""
        stub = self._stubs[next(self._turns)]
        with suppress(grpc.RpcError):
            await stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=DROP_LIMIT_S, metadata=self._metadata)

    async def _unary(self, method: "_Call[_Response]", request: object) -> _Response:
        outage = self._outage()
        while True:
            try:
                return await method(self._stubs[next(self._turns)])(
                    request, timeout=CALL_LIMIT_S, metadata=self._metadata
                )
            except grpc.RpcError as error:
                delay_s = outage.delay_after(from_rpc(error), unary=True)
            await asyncio.sleep(delay_s)

    def _outage(self) -> Outage:
        return Outage(self._retries, time.monotonic, self._rng)


class AsyncStream(AsyncIterator[Delta]):
    """An answer on its way: iterate over its deltas. It goes on by itself at another gateway if its own dies.

    One task reads it; any may call `cancel`. A reader that is cancelled, by `asyncio.timeout` say, may read on: nothing
    is lost. Leaving it as a context manager before its end cancels the request, unless the caller chose its id.
    """

    def __init__(
        self,
        resumption: Resumption,
        stubs: Sequence["inference_pb2_grpc.InferenceServiceAsyncStub"],
        metadata: CallMetadata,
        cancel: Callable[[str], Awaitable[RequestState]],
        drop: Callable[[str], Awaitable[None]] | None,
    ) -> None:
        """Made by `AsyncClient.generate` and `AsyncClient.attach`. The call is opened here."""
        self._resumption = resumption
        self._stubs = stubs
        self._metadata = metadata
        self._cancel = cancel
        self._drop = drop
        self._cancel_when_accepted = False
        self._closed = False
        self._call: Any = self._open()

    @property
    def request_id(self) -> str:
        """The id for `attach`, `cancel` and `get_request`."""
        return self._resumption.request_id

    @property
    def text(self) -> str:
        """The text received so far; with several choices, of the first."""
        return self._resumption.text

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens received so far (with those given to `attach`); with several choices, of the first."""
        return self._resumption.token_ids

    @property
    def choices(self) -> Sequence[Choice]:
        """What was received of each choice so far: text, tokens, log-probabilities."""
        return self._resumption.choices

    @property
    def finished(self) -> Finished | None:
        """Why it ended, usage and timings; None before the end."""
        return self._resumption.finished

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta. Raises ShoalError if the request failed, or the fleet was away for too long."""
        while not self._resumption.ended and not self._closed:
            response = await self._response()
            if response is None:
                continue
            try:
                delta = self._resumption.receive(response)
            except ShoalError:
                self._call.cancel()
                raise
            if self._cancel_when_accepted and self._resumption.accepted:
                await self._cancel_now_accepted()
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def read(self) -> str:
        """Wait for the end; returns the whole text, of the first choice."""
        async for _ in self:
            pass
        return self.text

    async def cancel(self) -> None:
        """Ask the fleet to end the request. The stream goes on to its end, with reason `cancelled`."""
        try:
            await self._cancel(self.request_id)
        except NotFound:
            if self._resumption.ended:
                return
            # Not accepted yet, so nobody knows it: to be repeated when it is.
            self._cancel_when_accepted = True
            if self._resumption.accepted:
                await self._cancel_now_accepted()

    async def close(self) -> None:
        """Stop reading. Nothing happens if it has ended."""
        if self._closed or self._resumption.ended:
            return
        self._closed = True
        self._call.cancel()
        if self._drop:
            await self._drop(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _response(self) -> pb.GenerateResponse | None:
        """The next response; None after the call broke and was opened again."""
        if self._call.cancelled():
            # gRPC cancels a call with the task that reads it.
            self._call = self._open()
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            failure = from_rpc(error)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            return None
        else:
            if response is not grpc.aio.EOF:  # type: ignore[attr-defined]
                return response  # type: ignore[no-any-return]
            failure = Unavailable("the gateway ended the stream before the answer's end")
        if not self._closed:
            await asyncio.sleep(self._resumption.failed(failure))
            self._call = self._open()
        return None

    async def _cancel_now_accepted(self) -> None:
        self._cancel_when_accepted = False
        await self._cancel(self.request_id)

    def _open(self) -> Any:
        call = self._resumption.next_call()
        stub = self._stubs[call.gateway]
        if isinstance(call, GenerateCall):
            return stub.Generate(call.request, metadata=self._metadata)
        return stub.Attach(call.request, metadata=self._metadata)
