"""One open stream: what its client was given, and what waits to be sent to it.

While the client is slow, deltas of a choice are joined into one, so that what waits is bounded by what a request may
generate, and a client that reads nothing costs nobody else anything.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from gen.shoal.inference.v1 import inference_pb2
from gen.shoal.inference.v1.inference_pb2 import TokenLogprobs
from services.common import log
from services.common.errors import ShoalError, Unavailable
from services.common.ids import RequestKey
from services.common.record.history import Held
from services.common.record.reader import Acceptance, Reader, Refused
from services.common.record.record import Attempt
from services.common.telemetry.tracing import Span

End = inference_pb2.Finished | ShoalError
MAX_PIECES = 128
"""Texts of waiting deltas that are kept apart before they are joined."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request as it was accepted: what never changes. Times are Redis' clock, ms since the epoch; 0: none."""

    key: RequestKey
    payload: bytes
    """A serialized fleet.v1.RequestPayload."""
    num_prompt_tokens: int
    digest: str
    accepted_at_ms: int
    deadline_at_ms: int
    resume_ms: int
    traceparent: str

    @property
    def request_id(self) -> str:
        """The client's part of the key."""
        return self.key.partition("/")[2]


class Stream:
    """A stream to one client. Changed on the gateway's event loop only, by delivery, watch and its call."""

    def __init__(self, accepted: Accepted, reader: Reader, span: Span, now_s: float) -> None:
        """`span`: of its call. `now_s`: the loop's clock, s."""
        self.accepted = accepted
        self.reader = reader
        self.heard_at_s = now_s
        """When a worker last sent something for it."""
        self.doubted = False
        """The record may have changed unseen, even though tokens come: to be looked at."""
        self.unknown_since_s: float | None = None
        """Since when Redis has no record of it."""
        self.failed_replays = 0
        self.called_at_s: float | None = None
        """When its call of Generate came, by the loop's clock. None: it was opened by an Attach."""
        self.has_tokens = False
        """Whether any have come."""
        self.first_token_at_s: float | None = None
        """When a worker sent the first of them."""
        self.span = span
        """Of its call; whoever closes the stream ends it."""
        self.closed = False
        """Its call is over."""
        self.open_number = 0
        """Of the last open that was taken; every answer to its worker names it."""
        self.end: End | None = None
        self._waiting = [_Waiting() for _ in reader.delivered()]
        self._frozen = False
        self._wake = asyncio.Event()

    @property
    def key(self) -> RequestKey:
        """The request."""
        return self.accepted.key

    def about(self) -> dict[str, object]:
        """Fields of a log line about it."""
        return log.about(self.key, self.accepted.traceparent)

    # Tokens from workers

    def open(self, attempt: Attempt, reader: int) -> Refused | None:
        """An attempt asks to send. None: it may, behind what the reader was delivered."""
        if self._closed:
            return Refused.NO_READER
        return self.reader.open(attempt, reader)

    def take(self, attempt: Attempt, delta: inference_pb2.Delta, now_s: float) -> Acceptance:
        """Judge new tokens, and put them into the stream if they follow.

        NEW: `wake` is to be called at once or with others. GAP: the worker is to be told to go back.
        """
        choice = delta.choice
        if self._closed or choice >= len(self._waiting):
            return Acceptance.REFUSED
        tokens = delta.token_ids
        acceptance = self.reader.accept(attempt, choice, delta.index, len(tokens))
        if acceptance is not Acceptance.REFUSED:
            self.heard_at_s = now_s
        if acceptance is Acceptance.NEW:
            self._put(choice, delta.index, tokens, delta.text, delta.logprobs)
        return acceptance

    def take_end(self, attempt: Attempt, end: End, completion_tokens: int | None) -> bool:
        """Put an end told by a worker behind the tokens. False: it isn't the attempt's to tell, or tokens are missing.

        `completion_tokens`: of the whole request, over all choices, if told.
        """
        if self._closed or not self.reader.may_end(attempt):
            return False
        if completion_tokens is not None and completion_tokens != sum(held.count for held in self.reader.delivered()):
            return False
        self.finish(end)
        return True

    # What the stream gets

    def deliver(
        self, choice: int, index: int, tokens: Sequence[int], text: str, logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """These tokens, of which the first has this index, follow in the client's stream."""
        self._put(choice, index, tokens, text, logprobs)
        self._wake.set()

    def wake(self) -> None:
        """Send what waits."""
        self._wake.set()

    def finish(self, end: End) -> None:
        """End the stream behind what was delivered. The first end counts."""
        if self.end is None:
            self.end = end
            self._wake.set()

    def freeze(self) -> None:
        """Take nothing more from workers: the rest comes from the record."""
        self._frozen = True

    def thaw(self) -> None:
        """Take frames from workers again."""
        self._frozen = False

    @property
    def frozen(self) -> bool:
        """Whether the rest comes from the record."""
        return self._frozen

    @property
    def settled(self) -> bool:
        """Whether it ended by its request's end, or by another reader: nothing is left to be read here."""
        return self.end is not None and not isinstance(self.end, Unavailable)

    @property
    def _closed(self) -> bool:
        return self._frozen or self.end is not None

    def _put(
        self, choice: int, index: int, tokens: Sequence[int], text: str, logprobs: Sequence[TokenLogprobs]
    ) -> None:
        self.reader.deliver(choice, tokens)
        self.has_tokens = True
        self._waiting[choice].add(index, tokens, text, logprobs)

    # What the client gets

    async def responses(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Everything after `accepted`, as fast as the client reads. Raises the ShoalError that ended the stream."""
        yield inference_pb2.GenerateResponse(
            accepted=inference_pb2.Accepted(
                request_id=self.accepted.request_id, prompt_tokens=self.accepted.num_prompt_tokens
            )
        )
        while True:
            await self._wake.wait()
            self._wake.clear()
            for response in self._drained():
                yield response
            # A wake in between means that more waits in front of the end.
            if self.end is not None and not self._wake.is_set():
                break
        if isinstance(self.end, ShoalError):
            raise self.end
        yield inference_pb2.GenerateResponse(finished=self.end)

    def delivered(self) -> tuple[Held, ...]:
        """What the client was given, by choice."""
        return self.reader.delivered()

    @property
    def num_waiting_bytes(self) -> int:
        """Rough size of what the client has not taken yet."""
        return sum(waiting.num_bytes for waiting in self._waiting)

    def _drained(self) -> Iterator[inference_pb2.GenerateResponse]:
        for choice, waiting in enumerate(self._waiting):
            if waiting.tokens:
                yield inference_pb2.GenerateResponse(delta=waiting.taken(choice))


class _Waiting:
    """Tokens of one choice that the client has not been sent. Copies: a message's parts keep all of it in memory."""

    __slots__ = ("_logprobs_bytes", "index", "logprobs", "texts", "tokens")

    def __init__(self) -> None:
        self.index = 0
        self.tokens = array("I")
        self.texts: list[str] = []
        self.logprobs: inference_pb2.Delta | None = None
        """Holds nothing else: what is added to a message is copied."""
        self._logprobs_bytes = 0

    def add(self, index: int, tokens: Sequence[int], text: str, logprobs: Sequence[TokenLogprobs]) -> None:
        if not self.tokens:
            self.index = index
        self.tokens.extend(tokens)
        self.texts.append(text)
        if len(self.texts) >= MAX_PIECES:
            self.texts = ["".join(self.texts)]
        if logprobs:
            self.logprobs = self.logprobs or inference_pb2.Delta()
            self.logprobs.logprobs.extend(logprobs)
            self._logprobs_bytes += len(logprobs) * logprobs[0].ByteSize()

    def taken(self, choice: int) -> inference_pb2.Delta:
        text = self.texts[0] if len(self.texts) == 1 else "".join(self.texts)
        delta = inference_pb2.Delta(choice=choice, index=self.index, text=text, token_ids=self.tokens)
        if self.logprobs:
            delta.MergeFrom(self.logprobs)
        self.tokens = array("I")
        self.texts = []
        self.logprobs, self._logprobs_bytes = None, 0
        return delta

    @property
    def num_bytes(self) -> int:
        return sum(len(text) for text in self.texts) + 4 * len(self.tokens) + self._logprobs_bytes
