"""Short inputs on their way to one tokenizer: those that come while a call is under way go together in the next one.

A gRPC call costs gateway and tokenizer some 0.2 ms each, of which an input's own part is small. An input that comes
while none is under way waits for no other.
"""

import asyncio
from copy import copy

import grpc

from gen.shoal.fleet.v1 import tokenizer_pb2
from services.common.errors import ShoalError, from_rpc, from_status
from services.gateway.tokenizer_link import TokenizerLink

MOST_BYTES = 1_024
"""Of an input that goes with others: 0.3 ms of a tokenizer's work, so that waiting for all of them is short, also where
one name stands for many tokenizers, which longer inputs spread over."""
MOST_INPUTS = 64


class EncodeTogether:
    """Calls of one tokenizer's EncodeAll. `limit_s`: the longest that one takes."""

    def __init__(self, link: TokenizerLink, limit_s: float) -> None:
        self._link = link
        self._limit_s = limit_s
        self._waiting: list[tuple[bytes, asyncio.Future[bytes]]] = []
        self._wanted = asyncio.Event()

    async def encode(self, input_bytes: bytes) -> bytes:
        """A serialized EncodeResponse for a serialized EncodeRequest. Raises what Encode does, as ShoalErrors."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((input_bytes, answer))
        self._wanted.set()
        return await answer

    async def run(self) -> None:
        """Ask, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST_INPUTS], self._waiting[MOST_INPUTS:]
                wanted = [(asked, answer) for asked, answer in batch if not answer.done()]  # else its caller has gone
                if wanted:
                    await self._ask(wanted)

    async def _ask(self, batch: list[tuple[bytes, asyncio.Future[bytes]]]) -> None:
        request = tokenizer_pb2.EncodeAllRequest(inputs=[asked for asked, _ in batch])
        try:
            response = await self._link.stub.EncodeAll(request, timeout=self._limit_s)
        except grpc.aio.AioRpcError as rpc_error:
            error = from_rpc(rpc_error)
            for _, answer in batch:
                _fail(answer, copy(error))
            return
        for (_, answer), result in zip(batch, response.results, strict=True):
            if result.HasField("error"):
                _fail(answer, from_status(result.error))
            elif not answer.done():
                answer.set_result(result.response)


def _fail(answer: asyncio.Future[bytes], error: ShoalError) -> None:
    if not answer.done():
        answer.set_exception(error)
