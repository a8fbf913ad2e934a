"""Tokens that remember what they were conditioned on.

A token is sampled after a beginning; the hash of beginning and token is registered. So whoever holds a list of tokens
can check of each that it was sampled after exactly the tokens before it. Text whose end was conditioned on another
beginning is forged, and found.
"""

from collections.abc import Sequence
from random import Random

from services.common.ids import RequestKey

_TOKENS = 1 << 20
_END_ONE_IN = 53
ENDLESS = 1 << 30
"""A request with this `max_tokens` ends by nobody's will but a client's or the leader's."""


class Texts:
    """Every token that was ever sampled, by the hash of its text up to it."""

    def __init__(self, rng: Random, alike: bool) -> None:
        """`alike`: every attempt samples the same after the same beginning, as batch-invariant kernels do."""
        self._rng = rng
        self._sampled: set[int] = set()
        self.alike = alike

    def private(self) -> int:
        """An attempt's own randomness."""
        return 0 if self.alike else self._rng.getrandbits(30)

    def beginning(self, key: RequestKey, choice: int) -> int:
        """Hash of the empty text."""
        return hash((int.from_bytes(key.encode()), choice))

    def sample(self, text: int, randomness: int) -> tuple[int, int]:
        """The next token after a text, and the hash of both."""
        token = hash((text, randomness, 7)) % _TOKENS
        longer = hash((text, token))
        self._sampled.add(longer)
        return token, longer

    def extend(self, text: int, tokens: Sequence[int]) -> int:
        """Hash of a text with further tokens."""
        for token in tokens:
            text = hash((text, token))
        return text

    def is_true(self, text: int, tokens: Sequence[int]) -> bool:
        """Whether each token was sampled after exactly what stands before it."""
        for token in tokens:
            text = hash((text, token))
            if text not in self._sampled:
                return False
        return True

    def undisturbed(self, key: RequestKey, choice: int, max_tokens: int) -> tuple[int, ...]:
        """The whole text of a run without faults, where all attempts sample alike."""
        text, tokens = self.beginning(key, choice), list[int]()
        while not has_ended(tokens, max_tokens):
            token = hash((text, 0, 7)) % _TOKENS
            text = hash((text, token))
            tokens.append(token)
        return tuple(tokens)


def has_ended(tokens: Sequence[int], max_tokens: int) -> bool:
    """Whether a choice with these tokens is complete."""
    return len(tokens) >= max_tokens or (max_tokens < ENDLESS and bool(tokens) and tokens[-1] % _END_ONE_IN == 0)
