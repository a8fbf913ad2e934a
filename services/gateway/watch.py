"""Looks after streams that no worker sends anything for: their request may have ended, or be read elsewhere.

A worker tells ends and tokens to the gateway that the record names; when either dies, or a link breaks, the record is
what is left to ask. It is asked about silent streams only, all of them in one script call.
"""

import asyncio
import logging
from collections.abc import Callable

from services.common.errors import Exhausted, Internal, ShoalError, Unavailable
from services.common.ids import GatewayId
from services.common.record.states import ENDED
from services.common.store.connection import Recovering, StoreError
from services.common.store.requests import Peek, RequestStore
from services.gateway.open_streams import OpenStreams, superseded
from services.gateway.replay import Replay
from services.gateway.requests import Requests
from services.gateway.streams import Stream

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
UNKNOWN_LIMIT_S = 10.0
"""How long Redis may know nothing of a request, after it was recovered, before its stream is given up."""
MAX_REPLAYS = 16
MAX_FAILED_REPLAYS = 10


class Watch:
    """The watch over all open streams. `clock`: the loop's, in s; `gateway`: this one."""

    def __init__(
        self, streams: OpenStreams, store: RequestStore, requests: Requests, replay: Replay, gateway: GatewayId,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._streams = streams
        self._store = store
        self._requests = requests
        self._replay = replay
        self._gateway = gateway
        self._clock = clock
        self._replays = asyncio.Semaphore(MAX_REPLAYS)
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                await asyncio.sleep(INTERVAL_S)
                try:
                    await self._look()
                except Recovering:
                    logger.info("the watch waits for recovery")
                except StoreError as error:
                    logger.warning("the watch waits for Redis", extra={"error": str(error)})

    async def _look(self) -> None:
        now_s = self._clock()
        watched = [
            stream
            for stream in self._streams
            if stream.end is None and not stream.frozen and (stream.doubted or now_s - stream.heard_at_s >= INTERVAL_S)
        ]
        if not watched:
            return
        peeks = await self._store.peek([stream.key for stream in watched])
        for stream, peek in zip(watched, peeks, strict=True):
            # The answer speaks of the past: of a stream that ended or is being replaced meanwhile it proves nothing.
            replaced = self._streams.get(stream.key) is not stream or self._streams.is_arriving(stream.key)
            if stream.end is None and not replaced:
                await self._judge(stream, peek, now_s)

    async def _judge(self, stream: Stream, peek: Peek | None, now_s: float) -> None:
        if peek is None:
            stream.unknown_since_s = stream.unknown_since_s or now_s
            if now_s - stream.unknown_since_s >= UNKNOWN_LIMIT_S:
                stream.finish(_lost())
            return
        stream.unknown_since_s = None
        stream.doubted = False
        number, ended = stream.reader.number, peek.state in ENDED
        # The same number elsewhere: Redis lost that this reader came, and gave its number to a later one.
        if peek.gateway != self._gateway and (peek.reader > number or (peek.reader == number and not ended)):
            stream.finish(superseded())
        elif ended:
            stream.freeze()
            self._tasks.create_task(self._replay_end(stream))
        elif peek.reader != number or peek.reader_left_at_ms:
            # Redis lost that this stream reads, or was told that it left; or a reader came here whose call heard
            # nothing of it. Nobody else reads.
            await self._requests.return_to(stream, self._gateway)

    async def _replay_end(self, stream: Stream) -> None:
        async with self._replays:
            try:
                found = await self._store.read(stream.key)
                if found is not None and found[0].ended:
                    await self._replay.end(stream, found[0])
                    return
            except (StoreError, Unavailable, Exhausted) as error:
                self._failed(stream, error)
            except ShoalError as error:
                stream.finish(error)
            except Exception:
                # One record that cannot be read shall not end every other stream.
                logger.exception("a replay failed by a defect", extra=stream.about())
                stream.finish(Internal("the stored end of the request can't be read", reason="INTERNAL"))
        stream.thaw()

    def _failed(self, stream: Stream, error: Exception) -> None:
        stream.failed_replays += 1
        logger.warning("a replay failed", extra={**stream.about(), "error": str(error)})
        if stream.failed_replays >= MAX_FAILED_REPLAYS:
            stream.finish(Unavailable(f"the end of the request can't be read: {error}", reason="REPLAY_FAILED"))


def _lost() -> Unavailable:
    return Unavailable(
        "the fleet's store lost this request with its last writes; send it again", reason="REQUEST_LOST",
        retry_after_ms=1_000,
    )  # fmt: skip
