"""Calls to the tokenizers: each to the next one in turn, again elsewhere while they are away, within one deadline."""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from gen.shoal.fleet.v1 import tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import DeadlineExceeded, ShoalError, Unavailable, from_rpc
from services.common.telemetry.trace_context import TRACEPARENT_KEY
from services.gateway.encode_together import MOST_BYTES, EncodeTogether
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
        self._links = {link: EncodeTogether(link, timeout_s) for link in links}
        self._in_turn = itertools.cycle(links)
        self._timeout_s = timeout_s

    async def run(self) -> None:
        """Send inputs that go together, and let the links look after their TLS files; for ever."""
        async with asyncio.TaskGroup() as tasks:
            for link, together in self._links.items():
                tasks.create_task(link.run())
                tasks.create_task(together.run())

    async def encode(
        self, request: tokenizer_pb2.EncodeRequest, within_s: float | None = None, traceparent: str = ""
    ) -> tuple[int, ...]:
        """Tokens of a prompt or chat. `within_s`: the caller's own time left. `traceparent`: of the call, if traced.

        Raises DeadlineExceeded if that is over first.
        """
        if request.ByteSize() > MOST_BYTES or traceparent:
            metadata = ((TRACEPARENT_KEY, traceparent),) if traceparent else None
            response = await self._call(
                lambda link, left_s: link.stub.Encode(request, timeout=left_s, metadata=metadata), within_s
            )
        else:
            response = await self._call(lambda link, left_s: self._encode(request, link, left_s), within_s)
        return tuple(response.token_ids)

    async def decode(self, request: tokenizer_pb2.DecodeRequest) -> str:
        """Text that a stream shows after a given token."""
        return (await self._call(lambda link, left_s: link.stub.Decode(request, timeout=left_s))).text

    async def spell(self, token_ids: Sequence[int]) -> Sequence[bytes]:
        """What each of these tokens says, or a special token's name."""
        request = tokenizer_pb2.SpellRequest(token_ids=token_ids)
        return (await self._call(lambda link, left_s: link.stub.Spell(request, timeout=left_s))).spellings

    async def check_format(self, form: inference_pb2.ResponseFormat, within_s: float | None) -> None:
        """Raise InvalidRequest if answers of a form cannot be generated. `within_s`: as for `encode`."""
        request = tokenizer_pb2.CheckFormatRequest(response_format=form)
        await self._call(lambda link, left_s: link.stub.CheckFormat(request, timeout=left_s), within_s)

    async def describe(self) -> tokenizer_pb2.DescribeResponse:
        """Facts of the model."""
        return await self._call(
            lambda link, left_s: link.stub.Describe(tokenizer_pb2.DescribeRequest(), timeout=left_s)
        )

    async def _encode(
        self, request: tokenizer_pb2.EncodeRequest, link: TokenizerLink, left_s: float
    ) -> tokenizer_pb2.EncodeResponse:
        try:
            async with asyncio.timeout(left_s):
                encoded = await self._links[link].encode(request.SerializeToString())
        except TimeoutError as error:
            raise DeadlineExceeded("its time is over") from error
        return tokenizer_pb2.EncodeResponse.FromString(encoded)

    async def _call(self, ask: Callable[[TokenizerLink, float], Awaitable[R]], within_s: float | None = None) -> R:
        clock = asyncio.get_running_loop().time
        limit_s = self._timeout_s if within_s is None else min(self._timeout_s, within_s)
        until_s = clock() + limit_s
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return await ask(next(self._in_turn), until_s - clock())
            except (grpc.aio.AioRpcError, ShoalError) as failure:
                error = failure if isinstance(failure, ShoalError) else from_rpc(failure)
                backoff_s = FIRST_BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                if isinstance(error, DeadlineExceeded) or clock() + backoff_s >= until_s:
                    raise _too_late(within_s, limit_s, error) from failure
                if not isinstance(error, Unavailable):
                    raise error from failure.__cause__ if error is failure else failure
                if attempt == MAX_ATTEMPTS:
                    raise _away(f"no tokenizer answers: {error.message}") from failure
            await asyncio.sleep(backoff_s)
        raise AssertionError("unreachable")


def _too_late(within_s: float | None, limit_s: float, error: Exception) -> DeadlineExceeded | Unavailable:
    if within_s is not None and limit_s == within_s:
        return DeadlineExceeded("the deadline passed before the request was accepted: nothing was stored")
    return _away(f"no tokenizer answered within {limit_s * 1000:.0f} ms: {error}")


def _away(message: str) -> Unavailable:
    return Unavailable(message, reason="TOKENIZER_UNAVAILABLE", retry_after_ms=RETRY_AFTER_MS)
