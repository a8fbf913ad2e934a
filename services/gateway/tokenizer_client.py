"""Calls to the tokenizers: each to the next one in turn, again elsewhere while they are away, within one deadline."""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from gen.shoal.fleet.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import DeadlineExceeded, Unavailable, from_rpc
from services.common.telemetry.trace_context import TRACEPARENT_KEY
from services.gateway.tokenizer_link import TokenizerLink

MAX_ATTEMPTS = 5
FIRST_BACKOFF_S = 0.05
RETRY_AFTER_MS = 1_000

R = TypeVar("R")


class TokenizerClient:
    """The tokenizers behind some links. `timeout_s`: longest wait for an answer, retries included.

    Every call raises InvalidRequest for an input that cannot be taken, Exhausted if their queues are full, and
    Unavailable if none answers in time.
    """

    def __init__(self, links: Sequence[TokenizerLink], timeout_s: float) -> None:
        self._links = links
        self._in_turn = itertools.cycle(links)
        self._timeout_s = timeout_s

    async def run(self) -> None:
        """Let the links look after their TLS files, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for link in self._links:
                tasks.create_task(link.run())

    async def encode(
        self, request: tokenizer_pb2.EncodeRequest, within_s: float | None = None, traceparent: str = ""
    ) -> tuple[int, ...]:
        """Tokens of a prompt or chat. `within_s`: the caller's own time left. `traceparent`: of the call, if traced.

        Raises DeadlineExceeded if that is over first.
        """
        metadata = ((TRACEPARENT_KEY, traceparent),) if traceparent else None
        response = await self._call(
            lambda stub, left_s: stub.Encode(request, timeout=left_s, metadata=metadata), within_s
        )
        return tuple(response.token_ids)

    async def decode(self, request: tokenizer_pb2.DecodeRequest) -> str:
        """Text that a stream shows after a given token."""
        return (await self._call(lambda stub, left_s: stub.Decode(request, timeout=left_s))).text

    async def spell(self, token_ids: Sequence[int]) -> Sequence[bytes]:
        """What each of these tokens says, or a special token's name."""
        request = tokenizer_pb2.SpellRequest(token_ids=token_ids)
        return (await self._call(lambda stub, left_s: stub.Spell(request, timeout=left_s))).spellings

    async def check_format(self, form: inference_pb2.ResponseFormat, within_s: float | None) -> None:
        """Raise InvalidRequest if answers of a form cannot be generated. `within_s`: as for `encode`."""
        request = tokenizer_pb2.CheckFormatRequest(response_format=form)
        await self._call(lambda stub, left_s: stub.CheckFormat(request, timeout=left_s), within_s)

    async def describe(self) -> tokenizer_pb2.DescribeResponse:
        """Facts of the model."""
        return await self._call(lambda stub, left_s: stub.Describe(tokenizer_pb2.DescribeRequest(), timeout=left_s))

    async def _call(
        self,
        ask: "Callable[[tokenizer_pb2_grpc.TokenizerServiceAsyncStub, float], Awaitable[R]]",
        within_s: float | None = None,
    ) -> R:
        clock = asyncio.get_running_loop().time
        limit_s = self._timeout_s if within_s is None else min(self._timeout_s, within_s)
        until_s = clock() + limit_s
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return await ask(next(self._in_turn).stub, until_s - clock())
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc(rpc_error)
                backoff_s = FIRST_BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                if isinstance(error, DeadlineExceeded) or clock() + backoff_s >= until_s:
                    raise _too_late(within_s, limit_s, error) from rpc_error
                if not isinstance(error, Unavailable):
                    raise error from rpc_error
                if attempt == MAX_ATTEMPTS:
                    raise _away(f"no tokenizer answers: {error.message}") from rpc_error
            await asyncio.sleep(backoff_s)
        raise AssertionError("unreachable")


def _too_late(within_s: float | None, limit_s: float, error: Exception) -> DeadlineExceeded | Unavailable:
    if within_s is not None and limit_s == within_s:
        return DeadlineExceeded("the deadline passed before the request was accepted: nothing was stored")
    return _away(f"no tokenizer answered within {limit_s * 1000:.0f} ms: {error}")


def _away(message: str) -> Unavailable:
    return Unavailable(message, reason="TOKENIZER_UNAVAILABLE", retry_after_ms=RETRY_AFTER_MS)
