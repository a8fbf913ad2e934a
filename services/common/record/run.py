"""A worker's side of one attempt at one request: when it may sample, what it sends, what it journals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.common.ids import RequestKey
from services.common.record.history import Held, beyond, first_difference, rebased
from services.common.record.record import Attempt


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens of a choice that follow what the reader has. `index` is that of the first."""

    choice: int
    index: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MaySample:
    """The engine may sample, after these tokens that the reader holds beyond what is known; by choice."""

    forced: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Diverged:
    """The reader holds another history: the request must go on from it, under a new attempt; by choice."""

    histories: tuple[tuple[int, ...], ...]


class Run:
    """One attempt, as the front of its worker knows it. Changed only by the front, one call at a time.

    An attempt after the first samples nothing until the reader's gateway has stated what was delivered, or the grace
    has passed with nobody there (docs/protocol.md, "Whose tokens count"). What goes beyond the journal is forced, not
    sampled.
    """

    def __init__(
        self, key: RequestKey, attempt: Attempt, gateway: str, reader: int, journal: Sequence[Sequence[int]]
    ) -> None:
        self.key = key
        self.attempt = attempt
        self.gateway = gateway
        self.reader = reader
        self.known: list[list[int]] = [list(tokens) for tokens in journal]
        """Tokens of each choice: journaled, forced and sampled."""
        self.sampling = attempt.number == 1
        self.open = False
        """The reader's gateway takes frames from this attempt."""
        self._journaled = [len(tokens) for tokens in journal]
        self._sent = [0] * len(journal)

    def resume(self, held: Sequence[Held]) -> MaySample | Diverged | None:
        """The gateway took the open, and states what its client holds. None: sampling had begun, and it all fits."""
        if any(not self._fits(choice, claim) for choice, claim in enumerate(held)):
            return Diverged(
                tuple(
                    rebased(known, claim) if claim.start <= len(known) and not _extends(known, claim) else tuple(known)
                    for known, claim in zip(self.known, held, strict=True)
                )
            )
        forced = tuple(beyond(known, claim) for known, claim in zip(self.known, held, strict=True))
        for choice, claim in enumerate(held):
            self.known[choice].extend(forced[choice])
            self._sent[choice] = claim.count
        self.open = True
        return self._begin(forced)

    def grace_over(self) -> MaySample | None:
        """`resume_grace_ms` have passed since the attempt began. None: it samples already."""
        return self._begin(((),) * len(self.known))

    def redirect(self, gateway: str, reader: int) -> None:
        """Another reader counts from now on, and is to be opened.

        The inbox tells of readers in order, so the last one counts, whatever its number: Redis gives numbers again
        that it lost with its last writes.
        """
        self.gateway, self.reader, self.open = gateway, reader, False

    def sampled(self, choice: int, tokens: Sequence[int]) -> None:
        """The engine sampled these."""
        self.known[choice].extend(tokens)

    def frames(self, num_ready: Sequence[int] | None = None) -> Iterator[Frame]:
        """What the reader has not been sent, once; nothing unless its gateway is open.

        `num_ready`: of each choice, how many tokens may be sent; None: all.
        """
        if not self.open:
            return
        for choice, known in enumerate(self.known):
            sent = self._sent[choice]
            end = len(known) if num_ready is None else num_ready[choice]
            if sent < end:
                self._sent[choice] = end
                yield Frame(choice, sent, tuple(known[sent:end]))

    def unjournaled(self) -> Iterator[Frame]:
        """What the journal is not known to have."""
        for choice, known in enumerate(self.known):
            journaled = self._journaled[choice]
            if journaled < len(known):
                yield Frame(choice, journaled, tuple(known[journaled:]))

    def tails(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """For the outcome: of each choice, where the known journal ends, and what follows."""
        return tuple((start, tuple(known[start:])) for start, known in zip(self._journaled, self.known, strict=True))

    def journal_is(self, choice: int, length: int) -> None:
        """The journal of a choice has this length: after an append, or told by a gap."""
        self._journaled[choice] = min(length, len(self.known[choice]))

    def _fits(self, choice: int, claim: Held) -> bool:
        known = self.known[choice]
        if first_difference(known, claim) is not None:
            return False
        # An engine that samples is beyond forcing: its next token is on its way.
        return not (self.sampling and beyond(known, claim))

    def _begin(self, forced: tuple[tuple[int, ...], ...]) -> MaySample | None:
        if self.sampling:
            return None
        self.sampling = True
        return MaySample(forced)


def _extends(known: Sequence[int], claim: Held) -> bool:
    """Whether `known` agrees with all that is claimed, and has more."""
    return first_difference(known, claim) is None and claim.count <= len(known)
