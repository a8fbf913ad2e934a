"""The way of a new request through the gateway: checked, admitted, encoded, fitted, accepted."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from gen.shoal.fleet.v1 import request_pb2, tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import DeadlineExceeded, Exhausted, ShoalError
from services.common.ids import GatewayId, new_nonce, new_request_id, request_key
from services.common.log import about
from services.common.record import moves
from services.common.telemetry import conventions
from services.common.telemetry.trace_context import is_sampled
from services.common.telemetry.tracing import Side, Span, Tracer
from services.gateway import spans
from services.gateway.admission import BACKLOG_FULL
from services.gateway.backlog import Arrival, Backlog
from services.gateway.capacity import Capacity
from services.gateway.formats import AcceptedFormats
from services.gateway.identity import Identity, cache_salt
from services.gateway.known import KnownRequests
from services.gateway.max_tokens import fitted_max_tokens
from services.gateway.metrics import LEFT, GatewayMetrics
from services.gateway.model import Model
from services.gateway.requests import Requests
from services.gateway.streams import Stream
from services.gateway.tokenizer_client import TokenizerClient
from services.gateway.validation import ValidRequest, check_request_id, validate

logger = logging.getLogger(__name__)

MAX_IN_WORK = 16
"""Calls that are encoded and stored at once: enough for tokenizers and Redis, and so few that a flood's refusals, which
the event loop takes in turn with them, come soon. As many as the backlog has room for may wait."""
MAX_DEADLINE_MS = 30 * 24 * 3_600_000
"""A gRPC deadline farther away than this is none."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and how long it waits. `time_left_s`: None: as long as it takes."""

    identity: Identity
    traceparent: str
    time_left_s: Callable[[], float | None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What is written with each request."""

    gateway: GatewayId
    """This gateway."""
    backlog_limit: int
    resume_ms: int
    anonymous_resume_ms: int
    log_prompts: bool = False
    """Whether the log gets them: nothing else may write them there."""


class Generation:
    """Turns calls of Generate into streams."""

    def __init__(
        self, model: Model, tokenizer: TokenizerClient, capacity: Capacity, backlog: Backlog, known: KnownRequests,
        requests: Requests, limits: Limits, metrics: GatewayMetrics, tracer: Tracer, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        """`clock`: the loop's, in s."""
        self._model = model
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._backlog = backlog
        self._known = known
        self._requests = requests
        self._limits = limits
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._formats = AcceptedFormats(tokenizer)
        self._in_work = asyncio.Semaphore(MAX_IN_WORK)

    async def start(self, request: inference_pb2.GenerateRequest, caller: Caller) -> Stream:
        """The stream of an accepted request; whatever is raised before that has stored nothing.

        Raises InvalidRequest, NotFound, Exhausted, AlreadyExists, DeadlineExceeded, Unavailable.
        """
        called_at_s = self._clock()
        span = spans.begin_call(self._tracer, request, self._model.name, caller.traceparent)
        try:
            stream = await self._admit(request, caller, span)
        except ShoalError as error:
            self._metrics.refused(error)
            spans.end_refused(span, error)
            raise
        except BaseException:
            # Its client hung up meanwhile, or a defect.
            span.end(error=LEFT)
            raise
        stream.called_at_s = called_at_s
        return stream

    async def _admit(self, request: inference_pb2.GenerateRequest, caller: Caller, span: Span) -> Stream:
        with self._backlog.arrival() as arrival:
            # Before anything else is looked at: in a flood, this is all that most calls cost.
            await self._let_in(arrival, request.request_id, caller)
            async with self._in_work:
                await self._backlog.calm()
                return await self._accept(validate(request, self._model), caller, span, arrival)

    async def _accept(self, valid: ValidRequest, caller: Caller, span: Span, arrival: Arrival) -> Stream:
        prompt = valid.token_ids
        if valid.text is not None:
            prompt = await self._encode(valid.text, caller, span)
        if valid.response_format is not None:
            await self._formats.check(valid.response_format, caller.time_left_s())
        allowed = caller.identity.max_tokens_per_minute
        max_tokens = fitted_max_tokens(len(prompt), valid, self._model, await self._capacity.room(), allowed)
        move = self._move(valid, prompt, max_tokens, caller, span.traceparent)
        if self._limits.log_prompts:
            asked = list(prompt) if valid.text is None else str(valid.text)
            logger.info("prompt", extra={**about(move.key, span.traceparent), "prompt": asked})
        try:
            return await self._requests.submit(move, len(prompt), span, lambda: self._backlog.submitting(arrival))
        except Exhausted as error:
            if error.reason == BACKLOG_FULL:
                self._backlog.found_full()
            raise

    async def _encode(self, text: tokenizer_pb2.EncodeRequest, caller: Caller, span: Span) -> tuple[int, ...]:
        asked_at_s = self._clock()
        encode = self._tracer.begin("encode", span.traceparent, side=Side.CLIENT)
        recorded = self._tracer.enabled and is_sampled(encode.traceparent)
        try:
            prompt = await self._tokenizer.encode(text, caller.time_left_s(), encode.traceparent if recorded else "")
        except ShoalError as error:
            spans.end_refused(encode, error)
            raise
        self._metrics.encode.observe(self._clock() - asked_at_s)
        encode.end({conventions.USAGE_INPUT_TOKENS: len(prompt)})
        return prompt

    async def _let_in(self, arrival: Arrival, request_id: str, caller: Caller) -> None:
        try:
            await self._backlog.let_in(arrival)
        except Exhausted:
            if not request_id or not await self._known.knows(
                request_key(caller.identity.tenant, check_request_id(request_id))
            ):
                raise
            self._backlog.let_in_known(arrival)

    def _move(
        self, valid: ValidRequest, prompt: tuple[int, ...], max_tokens: int, caller: Caller, traceparent: str
    ) -> moves.Submit:
        request_id = valid.request_id or new_request_id()
        payload = self._payload(valid, request_id, prompt, max_tokens, caller, traceparent)
        return moves.Submit(
            key=request_key(caller.identity.tenant, request_id),
            digest=valid.digest,
            payload=payload.SerializeToString(),
            num_choices=valid.n,
            nonce=new_nonce(),
            gateway=self._limits.gateway,
            resume_ms=self._limits.resume_ms if valid.request_id else self._limits.anonymous_resume_ms,
            deadline_ms=_earlier_deadline_ms(valid.deadline_ms, caller.time_left_s()),
            backlog_limit=self._limits.backlog_limit,
            tenant_limit=caller.identity.max_in_flight,
            tokens_per_minute=caller.identity.max_tokens_per_minute,
            prompt_tokens=len(prompt),
            reserved_tokens=valid.n * max_tokens,
        )

    def _payload(
        self,
        valid: ValidRequest,
        request_id: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        caller: Caller,
        traceparent: str,
    ) -> request_pb2.RequestPayload:
        payload = request_pb2.RequestPayload(
            request_id=request_id,
            tenant=caller.identity.tenant,
            model=self._model.name,
            prompt_token_ids=prompt,
            sampling=valid.sampling,
            max_tokens=max_tokens,
            stop=valid.stop,
            stop_token_ids=valid.stop_token_ids,
            n=valid.n,
            logprobs=valid.logprobs,
            prompt_logprobs=valid.prompt_logprobs,
            response_format=valid.response_format,
            priority=valid.priority,
            time_to_first_token_ms=valid.time_to_first_token_ms,
            cache_salt=cache_salt(caller.identity.tenant),
            traceparent=traceparent,
        )
        if not payload.sampling.HasField("seed"):
            payload.sampling.seed = secrets.randbits(64)
        return payload


def _earlier_deadline_ms(asked_ms: int, time_left_s: float | None) -> int:
    """The earlier of both deadlines, in ms from now; 0: none. Raises DeadlineExceeded if the call's own has passed."""
    if time_left_s is None or time_left_s * 1000 > MAX_DEADLINE_MS:
        return asked_ms
    left_ms = int(time_left_s * 1000)
    if left_ms <= 0:
        raise DeadlineExceeded("the deadline passed before the request was accepted: nothing was stored")
    return min(asked_ms, left_ms) if asked_ms else left_ms
