"""Bad input gets its code, and a good request right after is answered: over the wire, against a real fleet.

Every field's limit is tested where it is checked (tests/unit/test_gateway_validation.py); here is what only a real
server can show.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import from_rpc
from tests.fleet.conftest import Fleet

GENERATE = "/shoal.inference.v1.InferenceService/Generate"
CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    return start()


@pytest.fixture
async def channel(fleet: Fleet) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(fleet.gateways[0], options=options) as opened:
        yield opened
        await a_good_request_is_answered(opened)


async def a_good_request_is_answered(channel: grpc.aio.Channel) -> None:
    request = pb.GenerateRequest(prompt="The sea", max_tokens=1, sampling=pb.Sampling(temperature=0))
    events = [event async for event in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)]
    assert events[-1].HasField("finished")


async def code_of(channel: grpc.aio.Channel, **fields: Any) -> tuple[grpc.StatusCode, str]:
    """The status and the named field that a request gets."""
    request = pb.GenerateRequest(**{"prompt": "Hi", "max_tokens": 1, **fields})
    return await code_of_bytes(channel, request.SerializeToString())


async def code_of_bytes(channel: grpc.aio.Channel, message: bytes) -> tuple[grpc.StatusCode, str]:
    call = channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)(message, timeout=30)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), from_rpc(error).field
    return CODE.OK, ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 9000}, "max_tokens"),
        ({"sampling": pb.Sampling(temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=float("inf"))}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=-1)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(top_p=0)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(top_p=2)}, "sampling.top_p"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="wizard", content="Hi")])}, "chat.messages[0].role"),
        ({"token_ids": pb.TokenIds(ids=[1, 49152])}, "token_ids.ids[1]"),
        ({"token_ids": pb.TokenIds(ids=[5] * 8192)}, "input"),
        ({"request_id": "a\x00b"}, "request_id"),
        ({"request_id": "x" * 1_000_000}, "request_id"),
    ],
)
async def test_a_bad_field_is_named(channel: grpc.aio.Channel, fields: dict[str, Any], field: str) -> None:
    if "chat" in fields or "token_ids" in fields:
        fields = {**fields, "prompt": None}
    assert await code_of(channel, **fields) == (CODE.INVALID_ARGUMENT, field)


async def test_an_unknown_model_is_not_found(channel: grpc.aio.Channel) -> None:
    assert (await code_of(channel, model="nobody"))[0] == CODE.NOT_FOUND


async def test_a_negative_max_tokens_cannot_be_written(channel: grpc.aio.Channel) -> None:
    # -1 on the wire is a varint of ten bytes: as uint32 it reads 4,294,967,295.
    message = pb.GenerateRequest(prompt="Hi").SerializeToString() + b"\x38" + b"\xff" * 9 + b"\x01"
    assert await code_of_bytes(channel, message) == (CODE.INVALID_ARGUMENT, "max_tokens")


async def test_invalid_utf8_and_random_bytes_are_refused(channel: grpc.aio.Channel) -> None:
    rng = random.Random(5)
    invalid_utf8 = b"\x1a\x02\xff\xfe"
    for message in (invalid_utf8, *[b"\xff" + rng.randbytes(rng.randrange(1, 200)) for _ in range(20)]):
        code, _ = await code_of_bytes(channel, message)
        # gRPC itself answers what is no message, before a service sees it.
        assert code in (CODE.INVALID_ARGUMENT, CODE.INTERNAL), message


async def test_a_message_of_20_mb_is_refused(channel: grpc.aio.Channel) -> None:
    assert (await code_of(channel, prompt="x" * 20_000_000))[0] == CODE.RESOURCE_EXHAUSTED


async def test_attach_to_what_never_was_is_not_found(channel: grpc.aio.Channel) -> None:
    call = inference_pb2_grpc.InferenceServiceStub(channel).Attach(pb.AttachRequest(request_id="never"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() == CODE.NOT_FOUND


@pytest.mark.timeout(600)
async def test_of_2000_clients_at_once_the_surplus_is_refused_and_the_rest_is_served(fleet: Fleet) -> None:
    async with grpc.aio.insecure_channel(fleet.gateways[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(prompt="The sea", max_tokens=1, sampling=pb.Sampling(temperature=0))

        async def ask() -> str:
            try:
                events = [event async for event in stub.Generate(request, timeout=300)]
            except grpc.aio.AioRpcError as error:
                refusal = from_rpc(error)
                told_when = refusal.retry_after_ms > 0
                return f"{error.code().name} {refusal.reason} {'with RetryInfo' if told_when else ''}"
            return "served" if events[-1].HasField("finished") else "cut"

        answers = Counter(await asyncio.gather(*(ask() for _ in range(2000))))
    assert set(answers) == {"served", "RESOURCE_EXHAUSTED BACKLOG_FULL with RetryInfo"}
    assert answers["served"] >= 500
