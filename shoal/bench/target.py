"""What a load can be put on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shoal.bench.ask import Ask

OnTokens = Callable[[], None]
"""Called at each message that brings tokens."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Of one answer, as the server counts them."""

    output: int
    prompt: int = 0
    cached: int | None = None
    """Of the prompt, found in the server's cache of prefixes; None: it does not say."""


class TargetError(Exception):
    """A request failed. `kind` is a few words for counting, the text what the server said."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Target(Protocol):
    """A server under load."""

    name: str
    """What is measured, for the report."""

    async def ask(self, ask: Ask, on_tokens: OnTokens) -> TokenCounts:
        """Send one request and read its stream to the end. Raises TargetError."""
        ...

    async def close(self) -> None:
        """Hang up."""
        ...


def check_length(ask: Ask, output_tokens: int) -> None:
    """Raise TargetError for an answer whose times would mislead: none at all, or not as long as asked."""
    if not output_tokens:
        raise TargetError("empty answer", "the stream ended without a token")
    if ask.ignore_eos and output_tokens != ask.max_tokens:
        raise TargetError(
            "wrong length",
            f"{output_tokens} tokens instead of {ask.max_tokens}: does the server take ignore_eos, and has the "
            "context room for them?",
        )
