"""What this gateway knows of its open streams, stated for the leader after Redis lost its last writes.

docs/protocol.md, "Lost writes".
"""

import asyncio
import logging
from collections.abc import Callable, Iterable

from gen.shoal.fleet.v1 import request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.ids import GatewayId
from services.common.record.history import Held
from services.common.store.connection import StoreError
from services.common.store.recovery import Recovery
from services.gateway.open_streams import OpenStreams
from services.gateway.readiness import Readiness
from services.gateway.streams import Stream

logger = logging.getLogger(__name__)

INTERVAL_S = 0.1
"""Between two looks: shorter than the moment that a leader waits for statements, even when it knows of nothing lost."""
REPEAT_S = 0.5
STREAMS_A_TURN = 100
"""Streams put into the statement before other tasks get a turn."""
CAUSE = "Redis is recovered"


class HoldingsPoster:
    """States what is held as soon as a recovery is needed, and again until it is complete.

    Afterwards too, of streams that Redis does not know: this gateway stood still through the whole recovery, or spoke
    just as it ended. The leader looks for such statements.
    """

    def __init__(
        self,
        recovery: Recovery,
        streams: OpenStreams,
        gateway: GatewayId,
        readiness: Readiness,
        clock: Callable[[], float],
    ) -> None:
        """`clock`: the loop's, in s; `gateway`: this one."""
        self._recovery = recovery
        self._clock = clock
        self._posted = ""
        self._posted_at_s = 0.0
        self._streams = streams
        self._gateway = gateway
        self._readiness = readiness

    async def run(self) -> None:
        """Look whether Redis was restarted, until cancelled."""
        while True:
            try:
                await self._look()
            except StoreError as error:
                logger.debug("Redis cannot be asked", extra={"error": str(error)})
            await asyncio.sleep(INTERVAL_S)

    async def _look(self) -> None:
        run_id = await self._recovery.needed()
        if run_id is None:
            await self._readiness.ready(CAUSE)
            await self._state_unknown()
            return
        await self._readiness.unready(CAUSE)
        if self._stated_of_late(run_id):
            return
        await self._state(self._streams, run_id)
        # Redis may have lost a change of reader, or the leader may have taken this gateway for dead meanwhile.
        for stream in self._streams:
            stream.doubted = True

    async def _state_unknown(self) -> None:
        unknown = [stream for stream in self._streams if stream.unknown_since_s is not None]
        if not unknown:
            return
        run_id = await self._recovery.generation()
        if run_id and not self._stated_of_late(run_id):
            await self._state(unknown, run_id)

    def _stated_of_late(self, run_id: str) -> bool:
        return run_id == self._posted and self._clock() - self._posted_at_s < REPEAT_S

    async def _state(self, streams: Iterable[Stream], run_id: str) -> None:
        await self._recovery.post(await self._holdings(streams), run_id)
        self._posted, self._posted_at_s = run_id, self._clock()

    async def _holdings(self, streams: Iterable[Stream]) -> request_pb2.Holdings:
        holdings = request_pb2.Holdings(holder=self._gateway)
        for count, stream in enumerate(streams, start=1):
            if stream.end is None:
                holdings.requests.append(self._held(stream))
            if count % STREAMS_A_TURN == 0:
                await asyncio.sleep(0)
        return holdings

    def _held(self, stream: Stream) -> request_pb2.HeldRequest:
        opened, accepted = stream.reader.opened, stream.accepted
        return request_pb2.HeldRequest(
            key=stream.key,
            # 0: none is known, so that none seems to contradict the worker's own.
            attempt=opened.number if opened else 0,
            nonce=opened.nonce if opened else "",
            choices=[inference_pb2.TokenIds(ids=_whole(held)) for held in stream.delivered()],
            payload=request_pb2.RequestPayload.FromString(accepted.payload),
            payload_digest=accepted.digest,
            reader=stream.reader.number,
            gateway=self._gateway,
            deadline_at_ms=accepted.deadline_at_ms,
            accepted_at_ms=accepted.accepted_at_ms,
            resume_ms=accepted.resume_ms,
        )


def _whole(held: Held) -> tuple[int, ...]:
    """All tokens of a choice; none, if only the last of them are known: a journal has no gaps."""
    return held.tokens if held.start == 0 else ()
