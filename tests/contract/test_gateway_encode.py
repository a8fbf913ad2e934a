"""A gateway asks a tokenizer for short inputs that come at once in one call, and each caller gets its own answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gen.shoal.fleet.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from services.common import rpc
from services.common.errors import DeadlineExceeded, Internal, InvalidRequest, to_status
from services.gateway.tokenizer_client import TokenizerClient
from services.gateway.tokenizer_link import TokenizerLink
from tests.contract.gateway_fleet import FakeTokenizer

WITHIN_S = 10.0


class Tokenizer(FakeTokenizer):
    """A token is a character; an empty prompt is refused. Answers while `answers` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.num_alone = 0
        self.num_left_out = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def EncodeAll(self, request: tokenizer_pb2.EncodeAllRequest, context: Any) -> Any:  # noqa: N802
        self.batches.append(len(request.inputs))
        await self.answers.wait()
        return tokenizer_pb2.EncodeAllResponse(results=[_encoded(each) for each in request.inputs[self.num_left_out :]])

    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> Any:  # noqa: N802
        self.num_alone += 1
        return tokenizer_pb2.EncodeResponse(token_ids=[ord(character) for character in request.prompt])


def _encoded(asked: bytes) -> tokenizer_pb2.Encoded:
    prompt = tokenizer_pb2.EncodeRequest.FromString(asked).prompt
    if not prompt:
        error = InvalidRequest("nothing", reason="INVALID_INPUT", field="prompt")
        return tokenizer_pb2.Encoded(error=to_status(error).SerializeToString())
    encoded = tokenizer_pb2.EncodeResponse(token_ids=[ord(character) for character in prompt])
    return tokenizer_pb2.Encoded(response=encoded.SerializeToString())


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
async def client(tokenizer: Tokenizer) -> AsyncIterator[TokenizerClient]:
    server = rpc.Server([])
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(tokenizer, server.grpc)
    link = TokenizerLink(await server.start("127.0.0.1:0"), None, WITHIN_S)
    client = TokenizerClient([link], WITHIN_S)
    running = asyncio.create_task(client.run())
    yield client
    running.cancel()
    await link.close()
    await server.stop(0)


def a_prompt(text: str) -> tokenizer_pb2.EncodeRequest:
    return tokenizer_pb2.EncodeRequest(prompt=text)


async def test_what_comes_while_a_call_is_under_way_goes_together(
    client: TokenizerClient, tokenizer: Tokenizer
) -> None:
    tokenizer.answers.clear()
    first = asyncio.create_task(client.encode(a_prompt("a")))
    await _until(lambda: tokenizer.batches == [1])
    others = [asyncio.create_task(client.encode(a_prompt(text))) for text in ("b", "", "cd")]
    await asyncio.sleep(0)
    tokenizer.answers.set()
    assert await first == (ord("a"),)
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert (answers[0], answers[2]) == ((ord("b"),), (ord("c"), ord("d")))
    assert isinstance(answers[1], InvalidRequest)
    assert (answers[1].reason, answers[1].field) == ("INVALID_INPUT", "prompt")
    assert tokenizer.batches == [1, 3]


async def test_a_long_input_and_one_that_is_traced_go_alone(client: TokenizerClient, tokenizer: Tokenizer) -> None:
    assert len(await client.encode(a_prompt("x" * 5_000))) == 5_000
    assert await client.encode(a_prompt("a"), traceparent=f"00-{1:032x}-{1:016x}-01") == (ord("a"),)
    assert (tokenizer.num_alone, tokenizer.batches) == (2, [])


async def test_a_tokenizer_that_leaves_inputs_out_fails_those_calls_and_no_later_one(
    client: TokenizerClient, tokenizer: Tokenizer
) -> None:
    tokenizer.num_left_out = 1
    with pytest.raises(Internal, match="0 inputs of 1"):
        await client.encode(a_prompt("a"))
    tokenizer.num_left_out = 0
    assert await client.encode(a_prompt("b")) == (ord("b"),)


async def test_a_caller_whose_time_is_over_waits_for_no_other(client: TokenizerClient, tokenizer: Tokenizer) -> None:
    tokenizer.answers.clear()
    with pytest.raises(DeadlineExceeded):
        await client.encode(a_prompt("a"), within_s=0.05)
    tokenizer.answers.set()
    assert await client.encode(a_prompt("b")) == (ord("b"),)


async def _until(condition: Any) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.005)
