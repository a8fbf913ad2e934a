"""DeliveryService: tokens from workers, put into the streams of clients.

Nothing here waits for a client, and nothing is created per token but the delta: this is the fleet's hottest Python.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from gen.shoal.fleet.v1 import delivery_pb2, delivery_pb2_grpc
from services.common.ids import RequestKey, WorkerId
from services.common.record.reader import Acceptance, Refused
from services.common.record.record import Attempt
from services.gateway.departures import Departures
from services.gateway.endings import told_by_worker
from services.gateway.hints import Hints
from services.gateway.metrics import GatewayMetrics
from services.gateway.open_streams import OpenStreams
from services.gateway.streams import Stream
from services.gateway.wakes import Wakes

logger = logging.getLogger(__name__)

SERVICE_NAME = delivery_pb2.DESCRIPTOR.services_by_name["DeliveryService"].full_name

MAX_ANSWERS = 64
"""Most answers of a kind in one message: each may state all tokens of a request."""

Context = Any
"""A grpc.aio.ServicerContext; its stubs know no callback that could be given to it."""


class DeliveryService(delivery_pb2_grpc.DeliveryServiceServicer):
    """The RPC of DeliveryService. `tasks` owns one reading task a link; `clock` is the loop's, in s."""

    def __init__(
        self, streams: OpenStreams, departures: Departures, hints: Hints, wakes: Wakes, tasks: asyncio.TaskGroup,
        metrics: GatewayMetrics, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._streams = streams
        self._departures = departures
        self._hints = hints
        self._wakes = wakes
        self._tasks = tasks
        self._metrics = metrics
        self._clock = clock

    async def Deliver(  # noqa: N802
        self, request_iterator: AsyncIterator[delivery_pb2.DeliverRequest], context: Context
    ) -> AsyncIterator[delivery_pb2.DeliverResponse]:
        """Take one worker's messages, and answer its opens."""
        link = _Link()
        reading = self._tasks.create_task(self._read(request_iterator, link), name="delivery link")
        # Called however the call ends; a generator's `finally` may come late, when it is collected.
        context.add_done_callback(lambda _: self._ended(link, reading))
        while (answers := await link.answers()) is not None:
            yield answers

    def _ended(self, link: "_Link", reading: asyncio.Task[None]) -> None:
        reading.cancel()
        # Workers keep a stream for as long as their session lives, and close their registration when it ends well: a
        # registered worker's stream ends only by its death, or by what lies between.
        if link.worker:
            self._hints.add(WorkerId(link.worker))

    async def _read(self, messages: AsyncIterator[delivery_pb2.DeliverRequest], link: "_Link") -> None:
        try:
            async for message in messages:
                self.route(message, link)
        except grpc.aio.BaseError as error:
            logger.info("link broken", extra={"worker": link.worker, "error": str(error)})
        except Exception:
            # One worker's nonsense ends its link, not the gateway.
            logger.exception("link ended by a defect", extra={"worker": link.worker})
        finally:
            link.close()

    def route(self, message: delivery_pb2.DeliverRequest, link: "_Link") -> None:
        """Bring each part of a message to its stream; answers go out together."""
        if message.worker_id:
            link.worker = message.worker_id
        for wish in message.opens:
            self._open(wish, link)
        if message.frames:
            self._take(message, link)
        for end in message.ends:
            stream = self._streams.get(end.key)
            if stream is not None:
                stream.take_end(_attempt(end.attempt), *told_by_worker(end))
        for close in message.closes:
            stream = self._streams.get(close.key)
            if stream is not None and stream.reader.number <= close.reader:
                # Not yet the end: Redis may have lost that reader, and given its number again. The record knows.
                stream.doubted = True

    def _take(self, message: delivery_pb2.DeliverRequest, link: "_Link") -> None:
        now_s = self._clock()
        get = self._streams.get
        for frame in message.frames:
            stream = get(frame.key)
            if stream is None:
                continue
            attempt = _attempt(frame.attempt)
            had_tokens = stream.has_tokens
            acceptance = stream.take(attempt, frame.delta, now_s)
            if acceptance is Acceptance.NEW:
                self._wakes.add(stream)
                if not had_tokens:
                    stream.first_token_at_s = now_s
                    self._metrics.first_token(stream)
            elif acceptance is Acceptance.GAP:
                link.resume(attempt, stream)

    def _open(self, wish: delivery_pb2.Open, link: "_Link") -> None:
        key, attempt, reader = wish.key, _attempt(wish.attempt), wish.reader
        stream = self._streams.get(key)
        # A number that is drawn again after lost writes may be lower than the one that the stream here still has.
        if (stream is None or stream.reader.number != reader) and self._streams.is_arriving(key):
            self._streams.when_settled(key, (link, attempt), lambda: self._open(wish, link))
            return
        refused = Refused.NO_READER if stream is None else stream.open(attempt, reader)
        if stream is not None and refused is None:
            stream.heard_at_s = self._clock()
            stream.open_number = wish.number
            link.resume(attempt, stream)
            return
        highest = stream.reader.opened.number if stream and stream.reader.opened else 0
        link.refuse(key, attempt, refused or Refused.NO_READER, highest)
        if stream is None or stream.reader.number < reader:
            # The record names a reader that this gateway does not have: it was started anew, or a reply was lost.
            self._departures.add(RequestKey(key), reader)


class _Link:
    """Answers to one worker that wait to be sent: the last of each kind for a request counts."""

    def __init__(self) -> None:
        self.worker = ""
        self._resumes: dict[str, delivery_pb2.Resume] = {}
        self._refusals: dict[str, delivery_pb2.Refusal] = {}
        self._closed = False
        self._wake = asyncio.Event()

    def resume(self, attempt: Attempt, stream: Stream) -> None:
        choices = [delivery_pb2.Delivered(count=held.count, token_ids=held.tokens) for held in stream.delivered()]
        self._resumes[stream.key] = delivery_pb2.Resume(
            key=stream.key, attempt=_attempt_id(attempt), choices=choices, open_number=stream.open_number
        )
        self._wake.set()

    def refuse(self, key: str, attempt: Attempt, refused: Refused, highest_attempt: int) -> None:
        self._refusals[key] = delivery_pb2.Refusal(
            key=key, attempt=_attempt_id(attempt), reason=_REASONS[refused], highest_attempt=highest_attempt
        )
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def answers(self) -> delivery_pb2.DeliverResponse | None:
        """What waits, together; None: the link is closed."""
        await self._wake.wait()
        self._wake.clear()
        if not self._resumes and not self._refusals:
            return None
        response = delivery_pb2.DeliverResponse()
        for key in list(self._resumes)[:MAX_ANSWERS]:
            response.resumes.append(self._resumes.pop(key))
        for key in list(self._refusals)[:MAX_ANSWERS]:
            response.refusals.append(self._refusals.pop(key))
        if self._resumes or self._refusals or self._closed:
            self._wake.set()
        return response


_REASONS = {
    Refused.STALE_ATTEMPT: delivery_pb2.REFUSAL_REASON_STALE_ATTEMPT,
    Refused.NO_READER: delivery_pb2.REFUSAL_REASON_NO_READER,
}


def _attempt(attempt: delivery_pb2.AttemptId) -> Attempt:
    return Attempt(attempt.number, attempt.nonce)


def _attempt_id(attempt: Attempt) -> delivery_pb2.AttemptId:
    return delivery_pb2.AttemptId(number=attempt.number, nonce=attempt.nonce)
