"""InferenceService: the RPCs, thin. Errors become statuses in services.common.rpc."""

from collections.abc import AsyncIterator
from typing import Any

from gen.shoal.inference.v1 import inference_pb2, inference_pb2_grpc
from services.common.ids import GatewayId, RequestKey, request_key
from services.gateway.admission import OpenCalls, ShortCalls
from services.gateway.authentication import Authentication
from services.gateway.endings import STATES
from services.gateway.generation import Caller, Generation
from services.gateway.identity import Identity, Metadata, traceparent_of
from services.gateway.lookup import described
from services.gateway.model import Model
from services.gateway.requests import Requests
from services.gateway.streams import Stream
from services.gateway.tokenizer_client import TokenizerClient
from services.gateway.validation import check_model, check_request_id, encodable, held_by_client

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

Context = Any
"""A grpc.aio.ServicerContext; its stubs know no callback that could be given to it."""
Responses = AsyncIterator[inference_pb2.GenerateResponse]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The RPCs of InferenceService."""

    def __init__(
        self, model: Model, gateway: GatewayId, calls: OpenCalls, short_calls: ShortCalls, generation: Generation,
        requests: Requests, tokenizer: TokenizerClient, authentication: Authentication,
    ) -> None:  # fmt: skip
        """`gateway`: this one."""
        self._model = model
        self._gateway = gateway
        self._calls = calls
        self._short_calls = short_calls
        self._generation = generation
        self._requests = requests
        self._tokenizer = tokenizer
        self._authentication = authentication

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> Responses:
        """Accept a request and stream it."""
        self._calls.enter(context, context.peer())
        metadata = _metadata(context)
        identity = await self._authentication.identify(metadata)
        caller = Caller(identity, traceparent_of(metadata), context.time_remaining)
        stream = await self._generation.start(request, caller)
        self._close_with(stream, context)
        async for response in stream.responses():
            yield response

    async def Attach(  # noqa: N802
        self, request: inference_pb2.AttachRequest, context: Context
    ) -> Responses:
        """Read a request on."""
        self._calls.enter(context, context.peer())
        key = await self._key(request.request_id, context)
        stream = await self._requests.attach(key, held_by_client(request, self._model), self._gateway)
        self._close_with(stream, context)
        async for response in stream.responses():
            yield response

    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """Ask for a request's end."""
        with self._short_calls.one():
            peek = await self._requests.cancel(await self._key(request.request_id, context))
        return inference_pb2.CancelResponse(state=STATES[peek.state])

    async def GetRequest(  # noqa: N802
        self, request: inference_pb2.GetRequestRequest, context: Context
    ) -> inference_pb2.GetRequestResponse:
        """Tell what the record says."""
        with self._short_calls.one():
            return described(await self._requests.read(await self._key(request.request_id, context)))

    async def CountTokens(  # noqa: N802
        self, request: inference_pb2.CountTokensRequest, context: Context
    ) -> inference_pb2.CountTokensResponse:
        """Encode and count."""
        with self._short_calls.one():
            await self._identity(context)
            check_model(request.model, self._model)
            tokens = await self._tokenizer.encode(encodable(request), context.time_remaining())
        return inference_pb2.CountTokensResponse(prompt_tokens=len(tokens))

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """Name the pool's model."""
        with self._short_calls.one():
            await self._identity(context)
        return inference_pb2.ListModelsResponse(models=[self._model.to_proto()])

    async def _identity(self, context: Context) -> Identity:
        return await self._authentication.identify(_metadata(context))

    async def _key(self, request_id: str, context: Context) -> RequestKey:
        # In this order: nothing is told of a request to a caller that is nobody.
        identity = await self._identity(context)
        return request_key(identity.tenant, check_request_id(request_id))

    def _close_with(self, stream: Stream, context: Context) -> None:
        # A callback, for it is called however the call ends, also while a response waits for a client that reads
        # nothing; a generator's `finally` would come late then, when it is collected.
        if context.done():
            self._requests.close(stream)
        else:
            context.add_done_callback(lambda _: self._requests.close(stream))


def _metadata(context: Context) -> Metadata:
    return context.invocation_metadata() or ()
