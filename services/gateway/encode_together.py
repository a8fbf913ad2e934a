"""Short inputs on their way to one tokenizer: those that come while a call is under way go together in the next one.

A gRPC call costs gateway and tokenizer some 0.2 ms each, of which an input's own part is small. An input that comes
while none is under way waits for no other.
"""

import asyncio
from copy import copy

import grpc

from gen.shoal.fleet.v1 import tokenizer_pb2
from services.common.errors import Internal, ShoalError, from_rpc, from_status
from services.gateway.tokenizer_link import TokenizerLink

MOST_BYTES = 1_024
"""Of an input that goes with others: 0.3 ms of a tokenizer's work, so that waiting for all of them is short, also where
one name stands for many tokenizers, which longer inputs spread over."""
MOST_INPUTS = 64

_Answer = asyncio.Future[tokenizer_pb2.Encoded]


class EncodeTogether:
    """Calls of one tokenizer's EncodeAll. `limit_s`: the longest that one takes."""

    def __init__(self, link: TokenizerLink, limit_s: float) -> None:
        self._link = link
        self._limit_s = limit_s
        self._waiting: list[tuple[bytes, _Answer]] = []
        self._wanted = asyncio.Event()

    async def encode(self, input_bytes: bytes) -> bytes:
        """A serialized EncodeResponse for a serialized EncodeRequest. Raises what Encode does, as ShoalErrors."""
        answer: _Answer = asyncio.get_running_loop().create_future()
        self._waiting.append((input_bytes, answer))
        self._wanted.set()
        encoded = await answer
        if encoded.HasField("error"):
            raise from_status(encoded.error)
        return encoded.response

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

    async def _ask(self, batch: list[tuple[bytes, _Answer]]) -> None:
        request = tokenizer_pb2.EncodeAllRequest(inputs=[asked for asked, _ in batch])
        try:
            response = await self._link.stub.EncodeAll(request, timeout=self._limit_s)
        except grpc.aio.AioRpcError as rpc_error:
            _fail(batch, from_rpc(rpc_error))
            return
        if len(response.results) != len(batch):
            _fail(batch, Internal(f"a tokenizer answered {len(response.results)} inputs of {len(batch)}"))
            return
        for (_, answer), encoded in zip(batch, response.results, strict=True):
            if not answer.done():
                answer.set_result(encoded)


def _fail(batch: list[tuple[bytes, _Answer]], error: ShoalError) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(copy(error))
