"""The client for ordinary, blocking code."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import NotFound, ShoalError, Unavailable, from_rpc
from services.common.tls.files import Tls
from shoal._gateways import CallMetadata, blocking_channel, call_metadata, parse_addresses, turns
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

CALL_LIMIT_S = 10.0
"""Longest time that a gateway may take for a call that is no stream, before another one is asked."""

DROP_LIMIT_S = 2.0
"""Longest that leaving an unfinished stream may take."""

_Response = TypeVar("_Response")
_Call = Callable[[inference_pb2_grpc.InferenceServiceStub], Callable[..., _Response]]


class Client:
    """A fleet, through its gateways. Threads may share it. Close it, or use it as a context manager."""

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
        self._channels = [blocking_channel(address, tls) for address in self.gateways]
        self._stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._turns = turns(len(self.gateways), self._rng.randrange(len(self.gateways)))

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> "Stream":
        """Ask, and stream the answer. Give one of `prompt` (raw text), `messages` (a chat) and `token_ids`."""
        request = generate_request(prompt, messages, token_ids, options)
        call = GenerateCall(next(self._turns), request)
        return self._stream(call, options.get("traceparent"), drop_at_close="request_id" not in options)

    def attach(self, request_id: str, from_index: int = 0, held_token_ids: Sequence[int] = ()) -> "Stream":
        """Go on with a request's stream at a token index. `held_token_ids`: the last tokens before it, if known."""
        request = pb.AttachRequest(request_id=request_id, from_index=from_index, held_token_ids=held_token_ids)
        return self._stream(AttachCall(next(self._turns), request), None, drop_at_close=False)

    def cancel(self, request_id: str) -> RequestState:
        """Ask for a request's end; returns where it then stood. A running one ends within about a step."""
        return state_of(self._unary(lambda stub: stub.Cancel, pb.CancelRequest(request_id=request_id)).state)

    def get_request(self, request_id: str) -> RequestInfo:
        """Where a request stands, what it used, and each decision made about it."""
        return request_info_of(self._unary(lambda stub: stub.GetRequest, pb.GetRequestRequest(request_id=request_id)))

    def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        model: str = "",
    ) -> int:
        """The number of prompt tokens that `generate` would charge."""
        request = count_tokens_request(prompt, messages, model)
        return self._unary(lambda stub: stub.CountTokens, request).prompt_tokens

    def list_models(self) -> list[Model]:
        """The models that the fleet serves."""
        return models_of(self._unary(lambda stub: stub.ListModels, pb.ListModelsRequest()))

    def close(self) -> None:
        """Hang up. Streams that are still open end with an error."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _stream(self, call: GenerateCall | AttachCall, traceparent: str | None, *, drop_at_close: bool) -> "Stream":
        resumption = Resumption(call, len(self._stubs), self._outage())
        metadata = (*self._metadata, *trace_metadata(traceparent))
        return Stream(resumption, self._stubs, metadata, self.cancel, self._drop if drop_at_close else None)

    def _drop(self, request_id: str) -> None:
        """Cancel what nobody will read, if that is quickly done: the fleet ends requests without a reader by itself."""
        stub = self._stubs[next(self._turns)]
        with suppress(grpc.RpcError):
            stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=DROP_LIMIT_S, metadata=self._metadata)

    def _unary(self, method: "_Call[_Response]", request: object) -> _Response:
        outage = self._outage()
        while True:
            try:
                return method(self._stubs[next(self._turns)])(request, timeout=CALL_LIMIT_S, metadata=self._metadata)
            except grpc.RpcError as error:
                delay_s = outage.delay_after(from_rpc(error), unary=True)
            time.sleep(delay_s)

    def _outage(self) -> Outage:
        return Outage(self._retries, time.monotonic, self._rng)


class Stream(Iterator[Delta]):
    """An answer on its way: iterate over its deltas. It goes on by itself at another gateway if its own dies.

    One thread reads it; any may call `cancel`. Leaving it as a context manager before its end cancels the request,
    unless the caller chose its id: then it can be attached to later.
    """

    def __init__(
        self,
        resumption: Resumption,
        stubs: Sequence[inference_pb2_grpc.InferenceServiceStub],
        metadata: CallMetadata,
        cancel: Callable[[str], RequestState],
        drop: Callable[[str], None] | None,
    ) -> None:
        """Made by `Client.generate` and `Client.attach`. The call is opened here, so that the fleet works already."""
        self._resumption = resumption
        self._stubs = stubs
        self._metadata = metadata
        self._cancel = cancel
        self._drop = drop
        self._cancel_when_accepted = False
        self._closed = threading.Event()
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

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """The next delta. Raises ShoalError if the request failed, or the fleet was away for too long."""
        try:
            return self._next()
        except BaseException:
            if not self._resumption.ended:
                # Also for an interrupt: the call is in an unknown state then, and a later `next` shall not use it.
                self._call.cancel()
            raise

    def read(self) -> str:
        """Wait for the end; returns the whole text, of the first choice."""
        for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Ask the fleet to end the request. The stream goes on to its end, with reason `cancelled`."""
        try:
            self._cancel(self.request_id)
        except NotFound:
            if self._resumption.ended:
                return
            # Not accepted yet, so nobody knows it: to be repeated when it is.
            self._cancel_when_accepted = True
            if self._resumption.accepted:
                self._cancel_now_accepted()

    def close(self) -> None:
        """Stop reading. Nothing happens if it has ended."""
        if self._closed.is_set() or self._resumption.ended:
            return
        self._closed.set()
        self._call.cancel()
        if self._drop:
            self._drop(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _next(self) -> Delta:
        while not self._resumption.ended and not self._closed.is_set():
            try:
                response = next(self._call, None)
            except grpc.RpcError as error:
                self._reopen(from_rpc(error))
                continue
            if response is None:
                self._reopen(Unavailable("the gateway ended the stream before the answer's end"))
                continue
            delta = self._resumption.receive(response)
            if self._cancel_when_accepted and self._resumption.accepted:
                self._cancel_now_accepted()
            if delta is not None:
                return delta
        raise StopIteration

    def _cancel_now_accepted(self) -> None:
        self._cancel_when_accepted = False
        self._cancel(self.request_id)

    def _reopen(self, error: ShoalError) -> None:
        if not self._closed.is_set() and not self._closed.wait(self._resumption.failed(error)):
            self._call = self._open()

    def _open(self) -> Any:
        call = self._resumption.next_call()
        stub = self._stubs[call.gateway]
        if isinstance(call, GenerateCall):
            return stub.Generate(call.request, metadata=self._metadata)
        return stub.Attach(call.request, metadata=self._metadata)
