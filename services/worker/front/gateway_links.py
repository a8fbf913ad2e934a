"""Streams from this worker to gateways: one for each gateway, all requests of a step in one message.

A link sends what its requests have not sent yet, whenever it can: while a gateway reads slowly, tokens wait in their
requests, and go out together. When a stream breaks, the link dials again and every request opens anew; the gateway
states what it has, and sending goes on behind it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

import grpc

from gen.shoal.fleet.v1 import delivery_pb2, delivery_pb2_grpc
from services.common import rpc
from services.common.ids import RequestKey, WorkerId, fleet_address
from services.common.record.history import Held
from services.common.record.record import Attempt
from services.common.tls.options import FleetTls
from services.worker.front.active import ActiveRequest, attempt_id

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0
MAX_REQUESTS_A_MESSAGE = 512
FULL_MESSAGE_BYTES = 4 * 1024 * 1024
"""A message that has so much takes no further request. One request may add 11 MB of log-probabilities, if its gateway
was away for long; the most that gRPC takes is 16."""

FEW = 16
"""While a link has so many requests at most, it sends at once."""
GATHER_S = 0.002
"""Else it waits so long for what else comes: requests begin and end one by one, each of which would be a message, and a
message costs both ends ten times what its parts do."""

OnResume = Callable[[ActiveRequest, Sequence[Held]], Awaitable[None]]
OnRefusal = Callable[[ActiveRequest, delivery_pb2.Refusal], Awaitable[None]]


class GatewayLinks:
    """All links of a session. Changed only by the session."""

    def __init__(
        self, worker: WorkerId, tls: FleetTls | None, tasks: asyncio.TaskGroup, on_resume: OnResume,
        on_refusal: OnRefusal,
    ) -> None:  # fmt: skip
        self._worker = worker
        self._tls = tls
        self._tasks = tasks
        self._on_resume = on_resume
        self._on_refusal = on_refusal
        self._links: dict[str, _Link] = {}

    def open(self, active: ActiveRequest) -> None:
        """Ask the request's gateway to take its frames."""
        link = self._link(active)
        if link is None or link.closed:
            address = fleet_address(active.run.gateway)
            link = self._links[address] = _Link(address, self._worker, self._tls, self._on_resume, self._on_refusal)
            link.task = self._tasks.create_task(link.run(), name=f"link to {address}")
        link.open(active)

    def tell(self, active: ActiveRequest) -> None:
        """The request may have new tokens."""
        link = self._link(active)
        if link and active.run.open:
            link.tell(active)

    def end(self, active: ActiveRequest, end: delivery_pb2.EndFrame) -> None:
        """The end is stored: tell it behind the last tokens, once the gateway takes them.

        A gateway that cannot be reached finds the end in the record.
        """
        link = self._link(active)
        if link:
            link.end(active, end)

    def close(self, active: ActiveRequest) -> None:
        """The reader at the request's gateway was superseded."""
        link = self._link(active)
        if link:
            link.close(active)

    def forget(self, active: ActiveRequest) -> None:
        """The request has left; nothing more is sent for it."""
        link = self._link(active)
        if link:
            link.forget(active)

    def _link(self, active: ActiveRequest) -> "_Link | None":
        """By address: a gateway that was started anew there takes the place of the one before."""
        return self._links.get(fleet_address(active.run.gateway))


class _Link:
    def __init__(
        self, address: str, worker: WorkerId, tls: FleetTls | None, on_resume: OnResume, on_refusal: OnRefusal
    ) -> None:
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self._address = address
        self._worker = worker
        self._tls = tls
        self._on_resume = on_resume
        self._on_refusal = on_refusal
        self._requests: dict[RequestKey, ActiveRequest] = {}
        # What the next message takes along; dicts keep the order and drop repetitions.
        self._opens: dict[RequestKey, ActiveRequest] = {}
        self._changed: dict[RequestKey, ActiveRequest] = {}
        self._ends: dict[RequestKey, delivery_pb2.EndFrame] = {}
        self._closes: list[delivery_pb2.CloseFrame] = []
        # Opens that are not answered: until then an end waits, since it goes to a gateway that takes the request.
        self._unanswered: set[RequestKey] = set()
        self._stream_number = 0
        self._wake = asyncio.Event()

    def open(self, active: ActiveRequest) -> None:
        self._requests[active.run.key] = active
        self._ask(active)
        self._unanswered.add(active.run.key)
        self._ends.pop(active.run.key, None)  # of an earlier attempt
        self._wake.set()

    def _ask(self, active: ActiveRequest) -> None:
        # Numbered when it is due, not when it is sent: from here on, answers to earlier ones speak of another reader.
        active.num_opens += 1
        self._opens[active.run.key] = active

    def tell(self, active: ActiveRequest) -> None:
        self._changed[active.run.key] = active
        self._wake.set()

    def end(self, active: ActiveRequest, end: delivery_pb2.EndFrame) -> None:
        if self._requests.get(active.run.key) is active:
            self._ends[active.run.key] = end
            self.tell(active)
            self._forget_untold(active)

    def close(self, active: ActiveRequest) -> None:
        self._closes.append(delivery_pb2.CloseFrame(key=active.run.key, reader=active.run.reader))
        self.forget(active)
        self._wake.set()

    def forget(self, active: ActiveRequest) -> None:
        if self._requests.get(active.run.key) is active:
            del self._requests[active.run.key]
            self._opens.pop(active.run.key, None)
            self._changed.pop(active.run.key, None)
            self._ends.pop(active.run.key, None)
            self._unanswered.discard(active.run.key)

    async def run(self) -> None:
        """Keep a stream to the gateway while there are requests for it."""
        retry_s = FIRST_RETRY_S
        try:
            while True:
                opened_at = asyncio.get_running_loop().time()
                try:
                    async with rpc.channel(self._address, self._tls) as channel:
                        await self._stream(channel)
                except (grpc.RpcError, asyncio.InvalidStateError) as error:
                    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else error
                    logger.warning("link broken", extra={"gateway": self._address, "error": str(code)})
                self._reset()
                if not self._requests:
                    return
                if asyncio.get_running_loop().time() - opened_at > LONGEST_RETRY_S:
                    retry_s = FIRST_RETRY_S
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LONGEST_RETRY_S)
        finally:
            self.closed = True

    def _reset(self) -> None:
        """The stream is gone, and what it carried with it: every request opens anew on the next, but those that ended:
        the gateway finds their ends.
        """
        self._changed.clear()
        self._closes.clear()
        for key in self._ends:
            del self._requests[key]
        self._ends.clear()
        for active in self._requests.values():
            active.run.open = False
        self._opens.clear()
        for active in self._requests.values():
            self._ask(active)
        self._unanswered = set(self._requests)
        self._stream_number += 1
        self._wake.set()

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        call = delivery_pb2_grpc.DeliveryServiceStub(channel).Deliver(self._messages(self._stream_number))
        try:
            async for response in call:
                await self._answer(response)
        finally:
            call.cancel()
            with suppress(asyncio.CancelledError, grpc.RpcError):
                await call.code()

    async def _messages(self, stream_number: int) -> AsyncIterator[delivery_pb2.DeliverRequest]:
        first = True
        while True:
            await self._wake.wait()
            if len(self._requests) > FEW:
                await asyncio.sleep(GATHER_S)
            if stream_number != self._stream_number:
                # grpc goes on reading for a stream that is broken: it would take away what is meant for the next.
                return
            message = self._next_message()
            if message is None:
                self._wake.clear()
                continue
            if first:
                message.worker_id = self._worker
                first = False
            yield message

    def _next_message(self) -> delivery_pb2.DeliverRequest | None:
        message = delivery_pb2.DeliverRequest()
        for key in list(self._opens)[:MAX_REQUESTS_A_MESSAGE]:
            active = self._opens.pop(key)
            run, number = active.run, active.num_opens
            message.opens.append(delivery_pb2.Open(key=key, attempt=attempt_id(run), reader=run.reader, number=number))
        num_bytes = 0
        for key in list(self._changed)[:MAX_REQUESTS_A_MESSAGE]:
            if num_bytes >= FULL_MESSAGE_BYTES:
                break
            active = self._changed.pop(key)
            frames = active.token_frames()
            message.frames.extend(frames)
            num_bytes += sum(frame.ByteSize() for frame in frames)
            if key in self._ends and active.run.open:
                end = self._ends[key]
                message.ends.append(end)
                num_bytes += end.ByteSize()
                self.forget(active)
        message.closes.extend(self._closes)
        self._closes.clear()
        return message if message.ByteSize() else None

    async def _answer(self, response: delivery_pb2.DeliverResponse) -> None:
        for resume in response.resumes:
            active = self._sender(resume.key, resume.attempt)
            if active and resume.open_number == active.num_opens:
                self._unanswered.discard(active.run.key)
                await self._on_resume(active, [Held(known.count, tuple(known.token_ids)) for known in resume.choices])
                self.tell(active)
                self._forget_untold(active)
        for refusal in response.refusals:
            active = self._sender(refusal.key, refusal.attempt)
            if active:
                self._unanswered.discard(active.run.key)
                await self._on_refusal(active, refusal)
                self._forget_untold(active)

    def _forget_untold(self, active: ActiveRequest) -> None:
        """Nothing waits for a gateway that does not take the request: it finds the end in the record."""
        key = active.run.key
        if key in self._ends and not active.run.open and key not in self._unanswered:
            self.forget(active)

    def _sender(self, key: str, attempt: delivery_pb2.AttemptId) -> ActiveRequest | None:
        active = self._requests.get(RequestKey(key))
        return active if active and active.run.attempt == Attempt(attempt.number, attempt.nonce) else None
