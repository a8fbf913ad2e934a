"""A request that this worker holds: one attempt, its sequences in the engine, its text."""

from collections.abc import Sequence
from dataclasses import dataclass

from gen.shoal.fleet.v1 import delivery_pb2, engine_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common import log
from services.common.record.run import Frame, Run
from services.common.record.states import RequestState
from services.common.store.inbox import Start
from services.common.text.stop import StopText, stop_texts
from services.common.text.text_stream import TextStream
from services.common.text.vocabulary import Vocabulary
from services.worker.front.spans import AttemptSpans

_STATES = {
    RequestState.FINISHED: inference_pb2.REQUEST_STATE_FINISHED,
    RequestState.CANCELLED: inference_pb2.REQUEST_STATE_CANCELLED,
    RequestState.EXPIRED: inference_pb2.REQUEST_STATE_EXPIRED,
    RequestState.FAILED: inference_pb2.REQUEST_STATE_FAILED,
}
"""Ends that a worker writes."""


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """How a choice ended. `hidden`: its last token ended it by its id, and shows no text."""

    reason: inference_pb2.FinishReason.ValueType
    hidden: bool


class _Choice:
    """One choice: its text, token by token, so that a stream can go on at any index.

    `logprobs` are those of its first tokens, as far as the engine has told them, if they are asked for.
    """

    __slots__ = ("_stream", "end", "last_token_s", "logprobs", "pieces", "sequence_id")

    def __init__(self, sequence_id: int, vocabulary: Vocabulary, stops: tuple[StopText, ...]) -> None:
        self.sequence_id = sequence_id
        self.pieces: list[str] = []
        self.logprobs: list[inference_pb2.TokenLogprobs] = []
        self.end: ChoiceEnd | None = None
        self.last_token_s: float | None = None
        """When the engine gave its last token; None: it has given none."""
        self._stream = TextStream(vocabulary, stops)

    def feed(self, token: int) -> bool:
        """Add one token's text. True: it completed a stop text, which ends the choice."""
        piece = self._stream.feed((token,))
        self.pieces.append(piece.text)
        if piece.stopped_at is None:
            return False
        self.end = ChoiceEnd(inference_pb2.FINISH_REASON_STOP, hidden=False)
        return True

    def finish(self, end: ChoiceEnd) -> None:
        """No token follows: what was held back belongs to the last token's text."""
        self.end = end
        rest = self._stream.end()
        if self.pieces:
            self.pieces[-1] += rest


class ActiveRequest:
    """A request on this worker. Changed only by the session, one call at a time."""

    def __init__(
        self, start: Start, vocabulary: Vocabulary, sequence_ids: Sequence[int], spans: AttemptSpans, now_s: float
    ) -> None:
        """`sequence_ids`: one for each choice. `now_s`: the front's monotonic clock."""
        self.run = Run(start.key, start.attempt, start.gateway, start.reader, start.journal)
        self.payload = start.payload
        self.suspect_until = start.suspect_until
        self.cached_tokens = 0
        self.prompt_logprobs: list[inference_pb2.TokenLogprobs] = []
        """As inference.v1.Finished.prompt_logprobs; choice 0's sequence tells them."""
        self.ending = False
        """Its end is being written: nothing more is taken for it."""
        self.num_opens = 0
        """Opens that were asked for; an answer to an older one is none."""
        self.announced = False
        """The record has been told that it runs here."""
        self.spans = spans
        self._placed_ms = max(0, start.placed_at_ms - start.accepted_at_ms)
        self._started_s = now_s
        self._num_given = sum(len(tokens) for tokens in start.journal)
        self._first_token_s: float | None = None
        self._has_form = self.payload.HasField("response_format")
        stops = stop_texts(self.payload.stop)
        self.choices = [_Choice(sequence_id, vocabulary, stops) for sequence_id in sequence_ids]
        for choice, tokens in enumerate(start.journal):
            self._take_known(choice, tokens)

    def sequences(self, remaining_ms: int) -> list[engine_pb2.AddSequence]:
        """What the engine is given: each choice that has not ended, or whose log-probabilities it is to tell."""
        adds = [
            engine_pb2.AddSequence(
                sequence_id=choice.sequence_id,
                payload=self.payload,
                choice=number,
                known_token_ids=self.run.known[number],
                held=not self.run.sampling,
                remaining_ms=remaining_ms,
                alone_until_tokens=self.suspect_until,
            )
            for number, choice in enumerate(self.choices)
            if choice.end is None or self.lacks_logprobs(number)
        ]
        for add in adds[1:]:
            add.fork_of = adds[0].sequence_id
        return adds

    def forced(self, tokens: Sequence[Sequence[int]]) -> None:
        """The reader holds these beyond what was known (`run.resume` has noted them): their text is taken along."""
        for choice, forced in enumerate(tokens):
            self._take_known(choice, forced)

    def sampled(self, choice: int, output: engine_pb2.SequenceOutput, now_s: float) -> bool:
        """Take an engine's output. True: a stop text ended the choice, and the engine does not know."""
        state = self.choices[choice]
        self._take_given_logprobs(choice, output)
        if state.end:
            # It ended under an earlier attempt; only what is told of its tokens was still missing. While it is held,
            # its reader may know of more tokens.
            is_over = self.run.sampling and not self.lacks_logprobs(choice)
            return is_over and output.end == engine_pb2.SEQUENCE_END_UNSPECIFIED
        if choice == 0 and output.token_ids:
            # Further choices find what the first has computed: nothing was saved that another request had paid for.
            self.cached_tokens = output.cached_tokens
        if output.token_ids and self._first_token_s is None:
            self._first_token_s = now_s
        hidden = output.end == engine_pb2.SEQUENCE_END_STOP_TOKEN
        for position, token in enumerate(output.token_ids):
            self.run.sampled(choice, (token,))
            if self.payload.HasField("logprobs"):
                state.logprobs.append(_with_top(output.logprobs[position], self.payload.logprobs))
            if hidden and position == len(output.token_ids) - 1:
                state.pieces.append("")
            elif state.feed(token):
                return output.end == engine_pb2.SEQUENCE_END_UNSPECIFIED
        if output.end == engine_pb2.SEQUENCE_END_STOP_TOKEN:
            state.finish(ChoiceEnd(inference_pb2.FINISH_REASON_STOP, hidden=True))
        elif output.end == engine_pb2.SEQUENCE_END_COMPLETE:
            state.finish(ChoiceEnd(inference_pb2.FINISH_REASON_STOP, hidden=False))
        elif output.end == engine_pb2.SEQUENCE_END_LENGTH:
            state.finish(ChoiceEnd(inference_pb2.FINISH_REASON_LENGTH, hidden=False))
        return False

    @property
    def may_wait_for_form(self) -> bool:
        """Whether the engine may still be compiling the form of its answer: no step holds it before, and that may take
        seconds."""
        return self._has_form and self._first_token_s is None

    @property
    def complete(self) -> bool:
        """Whether every choice has ended, and all that is told of its tokens is here."""
        return all(choice.end and not self.lacks_logprobs(number) for number, choice in enumerate(self.choices))

    def lacks_logprobs(self, choice: int) -> bool:
        """Whether log-probabilities are asked for that the choice's sequence has not told yet."""
        if self.payload.HasField("logprobs") and len(self.choices[choice].logprobs) < len(self.run.known[choice]):
            return True
        asks_of_prompt = choice == 0 and self.payload.HasField("prompt_logprobs")
        return asks_of_prompt and len(self.prompt_logprobs) < len(self.payload.prompt_token_ids) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens known of the longest choice."""
        return max(len(known) for known in self.run.known)

    def about(self) -> dict[str, object]:
        """Fields of a log line about it."""
        return log.about(self.run.key, self.payload.traceparent)

    def end_spans(self, error: str = "") -> None:
        """The attempt is over here. `error`: why it was not its end."""
        last_s = max((choice.last_token_s for choice in self.choices if choice.last_token_s), default=None)
        self.spans.end(self._first_token_s, last_s, self.cached_tokens, self._num_sampled, error=error)

    @property
    def _num_sampled(self) -> int:
        return sum(len(known) for known in self.run.known) - self._num_given

    @property
    def queued_s(self) -> float | None:
        """From acceptance to placement, if it was placed for the first time."""
        return self._placed_ms / 1000 if self.run.attempt.number == 1 else None

    def token_frames(self) -> list[delivery_pb2.TokenFrame]:
        """What the reader has not been sent, as messages; tokens wait for their log-probabilities."""
        asked = self.payload.HasField("logprobs")
        num_ready = [len(choice.logprobs) for choice in self.choices] if asked else None
        return [self._token_frame(frame) for frame in self.run.frames(num_ready)]

    def outcome(self, now_s: float) -> request_pb2.Outcome:
        """The end as the record keeps it, of a request whose every choice has ended or which is cut off now."""
        cut = ChoiceEnd(inference_pb2.FINISH_REASON_CANCELLED, hidden=False)
        ends = [choice.end or cut for choice in self.choices]
        return request_pb2.Outcome(
            reasons=[end.reason for end in ends],
            last_token_hidden=[end.hidden for end in ends],
            usage=inference_pb2.Usage(
                prompt_tokens=len(self.payload.prompt_token_ids),
                cached_tokens=self.cached_tokens,
                completion_tokens=sum(len(known) for known in self.run.known),
            ),
            timings=inference_pb2.Timings(
                placed_ms=self._placed_ms,
                first_token_ms=self._since_acceptance_ms(self._first_token_s or now_s),
                finished_ms=self._since_acceptance_ms(now_s),
            ),
            logprobs=[request_pb2.ChoiceLogprobs(tokens=choice.logprobs) for choice in self.choices]
            if self.payload.HasField("logprobs")
            else [],
            prompt_logprobs=self.prompt_logprobs,
        )

    def end_frame(self, state: RequestState, error: str, outcome: request_pb2.Outcome) -> delivery_pb2.EndFrame:
        """Its end, as a message."""
        return delivery_pb2.EndFrame(
            key=self.run.key,
            attempt=attempt_id(self.run),
            state=_STATES[state],
            finished=inference_pb2.Finished(
                reason=outcome.reasons[0],
                further_reasons=outcome.reasons[1:],
                usage=outcome.usage,
                timings=outcome.timings,
                prompt_logprobs=outcome.prompt_logprobs,
            ),
            error=error,
        )

    def _since_acceptance_ms(self, at_s: float) -> int:
        return self._placed_ms + round((at_s - self._started_s) * 1000)

    def _take_known(self, choice: int, tokens: Sequence[int]) -> None:
        """Tokens of earlier attempts: a stop among them means that only the end is missing.

        Whether an answer of a given form is cut or whole at its last token, the engine says.
        """
        state = self.choices[choice]
        for token in tokens:
            if token in self.payload.stop_token_ids:
                state.pieces.append("")
                state.finish(ChoiceEnd(inference_pb2.FINISH_REASON_STOP, hidden=True))
            elif state.feed(token):
                pass
            elif len(state.pieces) == self.payload.max_tokens and not self._has_form:
                state.finish(ChoiceEnd(inference_pb2.FINISH_REASON_LENGTH, hidden=False))

    def _take_given_logprobs(self, choice: int, output: engine_pb2.SequenceOutput) -> None:
        """Log-probabilities of tokens that the engine was given: of the prompt, then of known ones; in order."""
        state, num_prompt_tokens = self.choices[choice], len(self.payload.prompt_token_ids)
        for position, told in enumerate(output.given_logprobs, output.given_from):
            if position < num_prompt_tokens:
                self.prompt_logprobs.append(_with_top(told, self.payload.prompt_logprobs))
            elif self.payload.HasField("logprobs"):
                state.logprobs.append(_with_top(told, self.payload.logprobs))

    def _token_frame(self, frame: Frame) -> delivery_pb2.TokenFrame:
        choice, end = self.choices[frame.choice], frame.index + len(frame.tokens)
        return delivery_pb2.TokenFrame(
            key=self.run.key,
            attempt=attempt_id(self.run),
            delta=inference_pb2.Delta(
                choice=frame.choice,
                index=frame.index,
                text="".join(choice.pieces[frame.index : end]),
                token_ids=frame.tokens,
                logprobs=choice.logprobs[frame.index : end],
            ),
        )


def _with_top(told: inference_pb2.TokenLogprobs, num_top: int) -> inference_pb2.TokenLogprobs:
    """A copy with so many of the most probable tokens: the engine tells of all given tokens as many."""
    return inference_pb2.TokenLogprobs(logprob=told.logprob, top=told.top[:num_top])


def attempt_id(run: Run) -> delivery_pb2.AttemptId:
    """A run's attempt, as a message."""
    return delivery_pb2.AttemptId(number=run.attempt.number, nonce=run.attempt.nonce)
