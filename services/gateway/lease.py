"""This gateway's lease: while it beats, the leader takes its streams' readers for present."""

import asyncio
import logging
from collections.abc import Callable

from services.common.ids import GatewayId
from services.common.store.connection import StoreError
from services.common.store.gateways import GatewayLease
from services.gateway.open_streams import OpenStreams
from services.gateway.readiness import Readiness

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
LIFETIME_MS = 5_000
BEAT_LIMIT_S = 2.0
CAUSE = "Redis is away"


class Lease:
    """Beats once a second. Two beats missed: Redis counts as away. `clock`: the loop's, in s."""

    def __init__(
        self, lease: GatewayLease, gateway: GatewayId, streams: OpenStreams, readiness: Readiness,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._lease = lease
        self._gateway = gateway
        self._streams = streams
        self._readiness = readiness
        self._clock = clock
        self._beat_at_s = clock()
        self._num_missed = 0

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self._beat()
            await asyncio.sleep(INTERVAL_S)

    async def _beat(self) -> None:
        try:
            async with asyncio.timeout(BEAT_LIMIT_S):
                await self._lease.beat(self._gateway, LIFETIME_MS)
        except (StoreError, TimeoutError) as error:
            self._num_missed += 1
            logger.warning("a beat was missed", extra={"missed": self._num_missed, "error": str(error)})
            if self._num_missed >= 2:
                await self._readiness.unready(CAUSE)
            return
        self._num_missed = 0
        await self._readiness.ready(CAUSE)
        now_s = self._clock()
        if (now_s - self._beat_at_s) * 1000 > LIFETIME_MS:
            # The leader may have taken every stream's reader for gone: look at each record once.
            for stream in self._streams:
                stream.doubted = True
        self._beat_at_s = now_s
