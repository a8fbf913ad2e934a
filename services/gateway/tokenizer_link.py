"""A gateway's way to a tokenizer, or to all behind a name."""

import asyncio

import grpc

from gen.shoal.fleet.v1 import tokenizer_pb2_grpc
from services.common import rpc
from services.common.tls.options import FleetTls

LOOK_S = 10.0
"""A certificate is renewed long before it ends."""


class TokenizerLink:
    """A channel, opened anew when this gateway's TLS files have changed: it would show the former ones for ever."""

    def __init__(self, address: str, tls: FleetTls | None, grace_s: float) -> None:
        """`tls`: None: in plain. `grace_s`: the longest that a call takes."""
        self._address = address
        self._tls = tls
        self._grace_s = grace_s
        self._open()

    def _open(self) -> None:
        self._opened_with = self._tls.renewing.now() if self._tls else None
        self._channel: grpc.aio.Channel = rpc.open_channel(self._address, self._tls)
        self.stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)
        """What the next call goes by."""

    async def run(self) -> None:
        """Look after the files; calls that are open go on by the channel that they began with."""
        while self._tls:
            await asyncio.sleep(LOOK_S)
            if self._tls.renewing.now() is not self._opened_with:
                former = self._channel
                self._open()
                await former.close(self._grace_s)

    async def close(self) -> None:
        """Close it, with its open calls."""
        await self._channel.close(None)
