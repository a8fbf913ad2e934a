"""Tokens that two sides hold of one choice, compared: not only counted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Held:
    """What a reader holds of one choice: `count` tokens, of which `tokens` are the last, ending at `count`.

    `tokens` may be shorter than `count`: the rest is taken on trust.
    """

    count: int
    tokens: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        """Index of the first token that is stated."""
        return self.count - len(self.tokens)


NOTHING = Held(0)


def first_difference(known: Sequence[int], held: Held) -> int | None:
    """Index of the first token that both state and that differs, or None."""
    for index in range(held.start, min(held.count, len(known))):
        if known[index] != held.tokens[index - held.start]:
            return index
    return None


def difference_from_end(journal: Sequence[Sequence[int]], held: Iterable[Held]) -> tuple[int, int] | None:
    """Choice and index of the first token held that a finished request's journal has otherwise, or has not."""
    for choice, claim in enumerate(held):
        known = journal[choice]
        index = first_difference(known, claim)
        if index is None and claim.count > len(known):
            index = len(known)
        if index is not None:
            return choice, index
    return None


def beyond(known: Sequence[int], held: Held) -> tuple[int, ...]:
    """The held tokens that follow `known` directly; empty if there are none, or if a gap lies between."""
    if held.start > len(known):
        return ()
    return held.tokens[len(known) - held.start :]


def rebased(known: Sequence[int], held: Held) -> tuple[int, ...]:
    """The reader's own history, where it differs from `known`: known up to what is stated, then what is stated."""
    return (*known[: held.start], *held.tokens)
