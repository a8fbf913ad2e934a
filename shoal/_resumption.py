"""What a stream does next, without any I/O: one state machine under the sync and the async client.

    start ── Generate ──▶ accepted ── deltas ──▶ ended
      ▲  │ away                │ away
      └──┘ same request id     └──▶ Attach at the next gateway, with all tokens held ──▶ deltas …

A driver opens `next_call()`, gives each response to `receive`, and each failure to `failed`, until `ended`. Indices are
checked here: no token is given to the caller twice or out of order, whatever the gateways say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import Internal, ShoalError
from shoal._retries import Outage
from shoal._values import Choice, Delta, Finished, TokenLogprobs, finished_of, logprobs_of


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Call Generate at this gateway, a number below the number of gateways."""

    gateway: int
    request: pb.GenerateRequest


@dataclass(frozen=True, slots=True)
class AttachCall:
    """Call Attach at this gateway."""

    gateway: int
    request: pb.AttachRequest


@dataclass(slots=True)
class _Choice:
    """What the client holds of one choice: `count` tokens, of which `token_ids` are the last."""

    count: int = 0
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens received here."""


class Resumption:
    """One stream over its gateways. Owned by the driver that reads it."""

    def __init__(self, call: GenerateCall | AttachCall, num_gateways: int, outage: Outage) -> None:
        """`call` is the first one; an Attach says by its own fields what its caller holds."""
        self.request_id = call.request.request_id
        self.accepted = isinstance(call, AttachCall)
        self.finished: Finished | None = None
        self._first = call
        self._gateway = call.gateway
        self._num_gateways = num_gateways
        self._outage = outage
        self._choices: dict[int, _Choice] = {0: _Choice()}
        if isinstance(call, AttachCall):
            self._choices[0] = _Choice(call.request.from_index, list(call.request.held_token_ids))

    @property
    def ended(self) -> bool:
        """Whether all was received."""
        return self.finished is not None

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(self._choices[0].texts)

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens held so far, those from before an Attach included."""
        return tuple(self._choices[0].token_ids)

    @property
    def choices(self) -> Sequence[Choice]:
        """What is held of each choice that has begun; of all, in the end."""
        reasons = self.finished.reasons if self.finished else ()
        return [
            Choice(
                "".join(held.texts),
                tuple(held.token_ids),
                tuple(held.logprobs),
                reasons[number] if number < len(reasons) else None,
            )
            for number in range(max(len(reasons), max(self._choices) + 1))
            for held in [self._choices.get(number, _Choice())]
        ]

    def next_call(self) -> GenerateCall | AttachCall:
        """The call that goes on with the stream."""
        if isinstance(self._first, GenerateCall) and not self.accepted:
            return GenerateCall(self._gateway, self._first.request)
        held = self._choices[0]
        points = [
            pb.ResumePoint(choice=number, from_index=choice.count, held_token_ids=choice.token_ids)
            for number, choice in sorted(self._choices.items())
            if number > 0
        ]
        request = pb.AttachRequest(
            request_id=self.request_id, from_index=held.count, held_token_ids=held.token_ids, points=points
        )
        return AttachCall(self._gateway, request)

    def receive(self, response: pb.GenerateResponse) -> Delta | None:
        """Take a response; a delta is for the caller. Raises Internal if tokens are missing or come twice."""
        self._outage.answered()
        match response.WhichOneof("event"):
            case "accepted":
                self._accept(response.accepted)
            case "delta":
                return self._take(response.delta)
            case "finished":
                self.finished = finished_of(response.finished)
        return None

    def failed(self, error: ShoalError) -> float:
        """The call broke: go on with `next_call()` after so many seconds. Raises the error if the stream is lost."""
        delay_s = self._outage.delay_after(error)
        self._gateway = (self._gateway + 1) % self._num_gateways
        return delay_s

    def _accept(self, accepted: pb.Accepted) -> None:
        if not self.accepted:
            self.accepted = True
            self._outage.progressed()
        if accepted.request_id != self.request_id:
            raise Internal(
                f"asked for request {self.request_id}, but a gateway accepted {accepted.request_id!r}",
                reason="WRONG_REQUEST",
            )

    def _take(self, delta: pb.Delta) -> Delta:
        choice = self._choices.setdefault(delta.choice, _Choice())
        if delta.index != choice.count:
            raise Internal(
                f"request {self.request_id}, choice {delta.choice}: expected index {choice.count}, got {delta.index}",
                reason="NOT_CONTIGUOUS",
            )
        choice.count += len(delta.token_ids)
        choice.token_ids.extend(delta.token_ids)
        choice.texts.append(delta.text)
        logprobs = logprobs_of(delta.logprobs)
        choice.logprobs.extend(logprobs)
        self._outage.progressed()
        return Delta(delta.index, delta.text, tuple(delta.token_ids), delta.choice, logprobs)
