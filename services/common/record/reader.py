"""A gateway's side of one stream: whose tokens count, and which its client has been given."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.common.record.history import NOTHING, Held
from services.common.record.record import Attempt


class Refused(Enum):
    """Why an attempt is not opened."""

    STALE_ATTEMPT = "stale attempt"
    NO_READER = "no reader"


class Acceptance(Enum):
    """What to do with a frame."""

    NEW = "new"
    """Its tokens follow what was delivered: they are now delivered."""
    OLD = "old"
    """All of them were delivered already."""
    REFUSED = "refused"
    """It is not from the attempt opened last."""
    GAP = "gap"
    """Tokens before it are missing: answer with `delivered()` again."""


@dataclass(slots=True)
class _Choice:
    count: int
    tokens: list[int]


class Reader:
    """One reader of one request. Changed only by the gateway's delivery, one call at a time.

    Frames are taken only from the attempt opened last (docs/protocol.md, "Whose tokens count"): an open from an older
    attempt, or from one of the same number with another nonce, is refused. What is accepted here counts as delivered:
    it stands in this reader's stream, in order.
    """

    def __init__(self, number: int, num_choices: int, held: Sequence[Held] = ()) -> None:
        """`held`: what the client said it holds of each choice, from choice 0."""
        self.number = number
        self.opened: Attempt | None = None
        self._choices = [
            _Choice(claim.count, list(claim.tokens))
            for claim in (*held[:num_choices], *[NOTHING] * (num_choices - len(held)))
        ]

    def open(self, attempt: Attempt, reader: int) -> Refused | None:
        """An attempt asks to send to this reader. None: it may, behind `delivered()`."""
        if reader != self.number:
            return Refused.NO_READER
        if self.opened is not None and attempt != self.opened and attempt.number <= self.opened.number:
            return Refused.STALE_ATTEMPT
        self.opened = attempt
        return None

    def accept(self, attempt: Attempt, choice: int, index: int, num_tokens: int) -> Acceptance:
        """Judge a frame; follow NEW with `deliver`."""
        if attempt != self.opened:
            return Acceptance.REFUSED
        count = self._choices[choice].count
        if index == count:
            return Acceptance.NEW
        return Acceptance.OLD if index + num_tokens <= count else Acceptance.GAP

    def deliver(self, choice: int, tokens: Sequence[int]) -> None:
        """These tokens follow in the client's stream."""
        self._choices[choice].count += len(tokens)
        self._choices[choice].tokens.extend(tokens)

    def delivered(self) -> tuple[Held, ...]:
        """What the client holds, by choice."""
        return tuple(Held(choice.count, tuple(choice.tokens)) for choice in self._choices)

    def may_end(self, attempt: Attempt) -> bool:
        """Whether an end from this attempt may be told."""
        return attempt == self.opened
