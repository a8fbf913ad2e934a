"""An error raised in a service reaches its caller whole: code, message, reason, field, and when to come back."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.errors import ERRORS, Exhausted, ShoalError, from_rpc

WORDS: tuple[dict[str, Any], ...] = (
    {"reason": "BACKLOG_FULL", "retry_after_ms": 1_000},
    {"reason": "BACKLOG_FULL", "retry_after_ms": 2_000},
    {"reason": "INVALID_FIELD", "field": "max_tokens"},
    {},
)
EVERY_ERROR = [kind("the same words", **words) for kind in ERRORS.values() for words in WORDS]


class Failing(inference_pb2_grpc.InferenceServiceServicer):
    """Raises what `error` is; a stream says `accepted` first if asked for a prompt."""

    error: Exception

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        if request.prompt:
            yield pb.GenerateResponse(accepted=pb.Accepted(request_id="a"))
        raise self.error

    async def Cancel(self, request: pb.CancelRequest, context: object) -> pb.CancelResponse:  # noqa: N802
        raise self.error


@pytest.fixture
async def service() -> AsyncIterator[tuple[Failing, grpc.aio.Channel]]:
    failing, server = Failing(), rpc.Server([])  # type: ignore[abstract]
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(failing, server.grpc)
    address = await server.start("127.0.0.1:0")
    async with rpc.channel(address) as channel:
        yield failing, channel
    await server.stop(0)


async def refusals(channel: grpc.aio.Channel) -> list[ShoalError]:
    """What a stream, a stream that has begun, and a unary call are told."""
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
    told = []
    for prompt in ("", "begin"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(pb.GenerateRequest(prompt=prompt)):
                pass
        told.append(from_rpc(caught.value))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(pb.CancelRequest())
    return [*told, from_rpc(caught.value)]


async def test_every_error_is_told_in_its_own_words_also_after_a_similar_one(
    service: tuple[Failing, grpc.aio.Channel],
) -> None:
    failing, channel = service
    for error in EVERY_ERROR:
        failing.error = error
        for told in await refusals(channel):
            assert type(told) is type(error)
            assert (told.message, told.reason, told.field, told.retry_after_ms) == (
                error.message, error.reason, error.field, error.retry_after_ms,
            )  # fmt: skip


async def test_a_stream_that_fails_has_its_responses_first(service: tuple[Failing, grpc.aio.Channel]) -> None:
    failing, channel = service
    failing.error = Exhausted("full")
    call: Any = inference_pb2_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest(prompt="begin"))
    assert (await call.read()).accepted.request_id == "a"
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_defect_is_internal_and_says_nothing_of_itself(service: tuple[Failing, grpc.aio.Channel]) -> None:
    failing, channel = service
    failing.error = ZeroDivisionError("secret")
    for told in await refusals(channel):
        assert told.code == grpc.StatusCode.INTERNAL
        assert "secret" not in told.message
