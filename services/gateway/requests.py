"""Requests as their records know them: accepted, read on, cancelled, looked up. Every move goes through the store."""

import logging
from collections.abc import Callable
from dataclasses import replace

from redis.asyncio import Redis

from gen.shoal.fleet.v1 import request_pb2
from services.common import log
from services.common.errors import AlreadyExists, Internal, NotFound
from services.common.ids import GatewayId, RequestKey, new_nonce
from services.common.record import moves
from services.common.record.history import NOTHING, Held
from services.common.record.reader import Reader
from services.common.record.record import Record
from services.common.record.transitions import Verdict
from services.common.store.ids import claim_id, pool_of
from services.common.store.requests import Peek, RequestStore, Submitted
from services.common.telemetry.tracing import Side, Span, Tracer
from services.gateway import spans
from services.gateway.admission import backlog_full, tenant_full, tokens_used_up
from services.gateway.departures import Departures
from services.gateway.joining import Joining, completed
from services.gateway.metrics import GatewayMetrics
from services.gateway.open_streams import OpenStreams
from services.gateway.replay import Replay, diverged
from services.gateway.store_retry import retried
from services.gateway.streams import Accepted, Stream

logger = logging.getLogger(__name__)


class Requests:
    """The pool's requests, for this gateway's clients. All methods raise Unavailable while Redis is away."""

    def __init__(
        self, redis: Redis, pool: str, store: RequestStore, streams: OpenStreams, departures: Departures,
        replay: Replay, metrics: GatewayMetrics, tracer: Tracer, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        """`clock`: the loop's, in s."""
        self._redis = redis
        self._pool = pool
        self._store = store
        self._streams = streams
        self._departures = departures
        self._replay = replay
        self._metrics = metrics
        self._tracer = tracer
        self._joining = Joining(store, streams, clock)
        self._clock = clock

    async def submit(
        self, move: moves.Submit, num_prompt_tokens: int, span: Span, submitting: Callable[[], None]
    ) -> Stream:
        """Accept a request, and open its stream. A known one is read from its first token.

        `span`: of the call. `submitting`: called as the submit is sent.
        Raises Exhausted if the backlog or one of the tenant's quotas is full, AlreadyExists for an id that is taken.
        """
        tenant, _, request_id = move.key.partition("/")
        owner = await retried(lambda: claim_id(self._redis, tenant, request_id, self._pool))
        if owner != self._pool:
            raise _taken(request_id, f"by a request of model {owner}")
        with self._streams.arriving(move.key):
            try:
                asked_at_s, intake = self._clock(), self._tracer.begin("intake", span.traceparent)
                submitted = await retried(lambda: self._submit(move, submitting))
                self._metrics.intake.observe(self._clock() - asked_at_s)
                intake.end()
            except BaseException:
                # Whether it was stored is unknown, but nobody here will read it.
                intake.end(error="unknown")
                self._departures.add(move.key, 1)
                raise
            match submitted.answer.verdict:
                case Verdict.OK:
                    accepted = Accepted(
                        move.key, move.payload, num_prompt_tokens, move.digest,
                        submitted.accepted_at_ms, submitted.deadline_at_ms, move.resume_ms, span.traceparent,
                    )  # fmt: skip
                    logger.info("accepted", extra=log.about(move.key, span.traceparent))
                    return await self._open(
                        Stream(accepted, Reader(1, move.num_choices), span, self._clock()), (), move.gateway
                    )
                case Verdict.KNOWN:
                    # Also when the reply to a first try was lost: then this reads what that one stored.
                    return await self._attach(move.key, (), move.gateway, span)
                case Verdict.QUOTA:
                    raise tenant_full(tenant, submitted.answer.index, move.tenant_limit)
                case Verdict.TOKENS:
                    tokens = move.prompt_tokens + move.reserved_tokens
                    raise tokens_used_up(tenant, tokens, move.tokens_per_minute, submitted.answer.index)
                case Verdict.FULL:
                    raise backlog_full(submitted.answer.index, move.backlog_limit)
                case Verdict.CONFLICT:
                    raise _taken(request_id, "with another payload")
                case verdict:
                    raise Internal(f"a submit was answered {verdict}")

    async def _submit(self, move: moves.Submit, submitting: Callable[[], None]) -> Submitted:
        submitting()
        # A nonce of its own for each try: Redis may run one, lose it, and run the next.
        return await self._store.submit(replace(move, nonce=new_nonce()))

    async def attach(self, key: RequestKey, held: tuple[Held, ...], gateway: GatewayId) -> Stream:
        """Read a request on for a client, behind what it holds. The stream of an ended one has all that is left.

        Raises NotFound; InvalidRequest if tokens are missing before those that are stated; Aborted if it has ended, and
        differs from what is held.
        """
        await self._check_owned(key)
        held = await self._joining.joined(key, held)
        with self._streams.arriving(key):
            return await self._attach(key, held, gateway)

    async def _attach(self, key: RequestKey, held: tuple[Held, ...], gateway: str, span: Span | None = None) -> Stream:
        attached = await retried(lambda: self._store.attach(moves.Attach(key, gateway, held)))
        record, answer = attached.record, attached.answer
        if record is None:
            raise unknown(key)
        match answer.verdict:
            case Verdict.DIVERGED:
                raise diverged(answer.choice, answer.index)
            case Verdict.ENDED:
                stream = self._stream(record, held, span)
                stream.freeze()
                await self._replay.end(stream, record)
                return stream
            case Verdict.OK:
                stream = self._stream(record, held, span)
                logger.info("attached", extra={**stream.about(), "reader": record.reader})
                self._metrics.attached()
                return await self._open(stream, held, gateway)
            case verdict:
                raise Internal(f"an attach was answered {verdict}")

    async def _open(self, stream: Stream, held: tuple[Held, ...], gateway: str) -> Stream:
        """Make it the stream of its request here, or end it as superseded, if a later one is here already.

        A higher number is later, unless Redis lost the attach that drew it, and gives numbers again: then the record
        names this reader, which attaches again until its number is the highest.
        """
        if self._streams.has_higher(stream) and await self._counts(stream, gateway):
            return await self._attach(stream.key, held, gateway, stream.span)
        self._streams.install(stream)
        return stream

    async def _counts(self, stream: Stream, gateway: str) -> bool:
        """Whether the record names its reader."""
        try:
            (peek,) = await retried(lambda: self._store.peek([stream.key]))
        except BaseException:
            self._departures.add(stream.key, stream.reader.number)
            raise
        return peek is not None and (peek.gateway, peek.reader) == (gateway, stream.reader.number)

    async def return_to(self, stream: Stream, gateway: GatewayId) -> None:
        """Become the reader again: Redis does not know, or no longer, that this stream's client is here."""
        with self._streams.arriving(stream.key):
            attached = await self._store.attach(moves.Attach(stream.key, gateway, stream.delivered()))
            if attached.answer.verdict != Verdict.OK:
                return
            if self._streams.get(stream.key) is not stream:
                # Its client went meanwhile.
                self._departures.add(stream.key, attached.answer.index)
            else:
                stream.reader.number = attached.answer.index
                logger.warning("returned to a request", extra={**stream.about(), "reader": stream.reader.number})

    async def cancel(self, key: RequestKey) -> Peek:
        """Ask for the end, and tell where the request stands just after. Raises NotFound."""
        await self._check_owned(key)
        answer = await retried(lambda: self._store.cancel(moves.Cancel(key, "asked by a client")))
        peek = (await retried(lambda: self._store.peek([key])))[0]
        if answer.verdict == Verdict.UNKNOWN or peek is None:
            raise unknown(key)
        stream = self._streams.get(key)
        if stream is not None:
            # If it ended in the queue, no worker will say so: the watch looks sooner.
            stream.doubted = True
        logger.info("cancel asked", extra={**log.about(key, peek.traceparent), "state": peek.state})
        return peek

    async def read(self, key: RequestKey) -> Record:
        """The whole record. Raises NotFound."""
        await self._check_owned(key)
        found = await retried(lambda: self._store.read(key))
        if found is None:
            raise unknown(key)
        return found[0]

    def close(self, stream: Stream, *, cancel: bool = False) -> None:
        """The stream's client is gone, or has its end. May be called again.

        `cancel`: a client that is gone will not come back.
        """
        if not stream.closed:
            stream.closed = True
            self._metrics.ended(stream)
            spans.end_stream(stream)
        if self._streams.get(stream.key) is stream:
            self._streams.remove(stream)
            # An end that the record knows needs no word; neither does a reader that another has replaced.
            if not stream.settled:
                self._departures.add(stream.key, stream.reader.number, cancel=stream.about() if cancel else None)
                logger.info("left", extra={**stream.about(), "reader": stream.reader.number})

    async def _check_owned(self, key: RequestKey) -> None:
        tenant, _, request_id = key.partition("/")
        if await retried(lambda: pool_of(self._redis, tenant, request_id)) != self._pool:
            raise unknown(key)

    def _stream(self, record: Record, held: tuple[Held, ...], span: Span | None) -> Stream:
        payload = request_pb2.RequestPayload.FromString(record.payload)
        accepted = Accepted(
            record.key, record.payload, len(payload.prompt_token_ids), record.digest,
            record.accepted_at_ms, record.deadline_at_ms, record.resume_ms, payload.traceparent,
        )  # fmt: skip
        claims = [held[choice] if choice < len(held) else NOTHING for choice in range(record.num_choices)]
        whole = [completed(claim, record.journal[choice]) for choice, claim in enumerate(claims)]
        # An Attach goes on in the trace that the request began in.
        span = span or self._tracer.begin("attach", payload.traceparent, side=Side.SERVER)
        return Stream(accepted, Reader(record.reader, record.num_choices, whole), span, self._clock())


def unknown(key: RequestKey) -> NotFound:
    """No such request of this tenant."""
    request_id = key.partition("/")[2]
    return NotFound(
        f"request {request_id!r} is unknown: it never was, has expired, or belongs to another tenant",
        reason="REQUEST_UNKNOWN",
        field="request_id",
    )


def _taken(request_id: str, how: str) -> AlreadyExists:
    return AlreadyExists(
        f"request id {request_id!r} is in use {how}; choose another", reason="ID_TAKEN", field="request_id"
    )
