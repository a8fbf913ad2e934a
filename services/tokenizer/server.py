"""TokenizerService: encodes short inputs itself, and hands every other one to the pool, as the bytes it came in.

The front neither parses nor builds what depends on a long text's length: that alone would block its event loop for over
5 ms at a megabyte. So its handlers are registered on bytes instead of through the generated servicer.
"""

import asyncio
import time
from dataclasses import dataclass

import grpc

from gen.shoal.fleet.v1 import tokenizer_pb2
from services.common.errors import InvalidRequest, ShoalError, to_status
from services.common.model.stored_model import StoredModel, context_tokens
from services.common.telemetry.conventions import INPUT_BYTES
from services.common.telemetry.trace_context import TRACEPARENT_KEY
from services.common.telemetry.tracing import Side, Tracer
from services.common.text.stored_vocabulary import read_vocabulary
from services.tokenizer.encoding import InputError, TextCodec
from services.tokenizer.frames import Operation
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.pool import Pool

MOST_TOGETHER = 64
MOST_BYTES_TOGETHER = 4_096
"""Of EncodeAll: so much is parsed here in far less than 5 ms."""
MOST_BYTES_HERE = 256
"""Of inputs that the front encodes itself. Of longer ones the pool, which is given several at once, does more a
second."""
SERVICE_NAME = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name

Context = grpc.aio.ServicerContext[object, object]


@dataclass(frozen=True, slots=True)
class TokenizerService:
    """The RPCs of TokenizerService."""

    pool: Pool
    codec: TextCodec
    description: tokenizer_pb2.DescribeResponse
    max_input_bytes: int
    metrics: TokenizerMetrics
    tracer: Tracer

    async def encode(self, payload: bytes, context: Context) -> bytes:
        """Render and encode one input. Raises InvalidRequest, and what the pool raises."""
        if not self.tracer.enabled:
            return await self._submit(Operation.ENCODE, payload)
        parent = dict(context.invocation_metadata() or ()).get(TRACEPARENT_KEY, "")
        span = self.tracer.begin("tokenize", str(parent), {INPUT_BYTES: len(payload)}, side=Side.SERVER)
        try:
            answer = await self._submit(Operation.ENCODE, payload)
        except ShoalError as error:
            span.end(error=error.reason or error.code.name)
            raise
        span.end()
        return answer

    async def encode_all(
        self, request: tokenizer_pb2.EncodeAllRequest, context: Context
    ) -> tokenizer_pb2.EncodeAllResponse:
        """Encode several short inputs. Raises InvalidRequest if they are too many, or one is too long."""
        if len(request.inputs) > MOST_TOGETHER or any(len(each) > MOST_BYTES_TOGETHER for each in request.inputs):
            longest = max(len(each) for each in request.inputs)
            raise InvalidRequest(
                f"{len(request.inputs)} inputs, the longest of {longest} bytes, came together; the most are "
                f"{MOST_TOGETHER} of {MOST_BYTES_TOGETHER} bytes",
                reason="INPUT_TOO_LONG",
                field="inputs",
            )
        return tokenizer_pb2.EncodeAllResponse(
            results=await asyncio.gather(*(self._encoded(each) for each in request.inputs))
        )

    async def _encoded(self, payload: bytes) -> tokenizer_pb2.Encoded:
        try:
            return tokenizer_pb2.Encoded(response=await self._submit(Operation.ENCODE, payload))
        except ShoalError as error:
            return tokenizer_pb2.Encoded(error=to_status(error).SerializeToString())

    async def decode(self, payload: bytes, context: Context) -> bytes:
        """Return the text that a stream shows after a given token. Raises InvalidRequest, and what the pool raises."""
        return await self._submit(Operation.DECODE, payload)

    async def spell(self, payload: bytes, context: Context) -> bytes:
        """Return the bytes of single tokens. Raises InvalidRequest, and what the pool raises."""
        return await self._submit(Operation.SPELL, payload)

    async def check_format(self, payload: bytes, context: Context) -> bytes:
        """Compile a form of answers. Raises InvalidRequest if it cannot be kept, and what the pool raises."""
        return await self._submit(Operation.CHECK_FORMAT, payload)

    async def describe(
        self, request: tokenizer_pb2.DescribeRequest, context: Context
    ) -> tokenizer_pb2.DescribeResponse:
        """Return the model's facts."""
        return self.description

    async def _submit(self, operation: Operation, payload: bytes) -> bytes:
        asked_at_s = time.monotonic()
        try:
            self._check_length(payload)
            if operation is Operation.ENCODE and len(payload) <= MOST_BYTES_HERE:
                answer = self._encode_here(payload)
            else:
                answer = await self.pool.submit(operation, payload)
        except ShoalError as error:
            self.metrics.refused(error)
            raise
        self.metrics.done(operation, len(payload), time.monotonic() - asked_at_s)
        return answer

    def _encode_here(self, payload: bytes) -> bytes:
        try:
            return self.codec.encode(payload)
        except InputError as error:
            raise InvalidRequest(error.problem, reason="INVALID_INPUT", field=error.field) from error

    def _check_length(self, payload: bytes) -> None:
        if len(payload) > self.max_input_bytes:
            raise InvalidRequest(
                f"the input has {len(payload)} bytes; the most is {self.max_input_bytes}",
                reason="INPUT_TOO_LONG",
                field="input",
            )


def describe_model(model: StoredModel, name: str) -> tokenizer_pb2.DescribeResponse:
    """Gather the facts of a model that is served by the given name. Raises ModelFileError if one is missing."""
    vocabulary = read_vocabulary(model)
    return tokenizer_pb2.DescribeResponse(
        model=name,
        context_tokens=context_tokens(model),
        vocabulary_tokens=vocabulary.num_tokens,
        end_token_ids=vocabulary.end_token_ids,
    )


def handlers(service: TokenizerService) -> "grpc.GenericRpcHandler[bytes, bytes]":
    """The service, for `add_generic_rpc_handlers`."""
    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            "Encode": grpc.unary_unary_rpc_method_handler(service.encode),
            "EncodeAll": grpc.unary_unary_rpc_method_handler(
                service.encode_all,
                request_deserializer=tokenizer_pb2.EncodeAllRequest.FromString,
                response_serializer=tokenizer_pb2.EncodeAllResponse.SerializeToString,
            ),
            "Decode": grpc.unary_unary_rpc_method_handler(service.decode),
            "Spell": grpc.unary_unary_rpc_method_handler(service.spell),
            "CheckFormat": grpc.unary_unary_rpc_method_handler(service.check_format),
            "Describe": grpc.unary_unary_rpc_method_handler(
                service.describe,
                request_deserializer=tokenizer_pb2.DescribeRequest.FromString,
                response_serializer=tokenizer_pb2.DescribeResponse.SerializeToString,
            ),
        },
    )
