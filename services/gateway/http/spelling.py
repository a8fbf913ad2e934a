"""What single tokens say, for log-probabilities: asked of the tokenizers once, and remembered."""

from collections.abc import Mapping
from dataclasses import dataclass

from gen.shoal.inference.v1 import inference_pb2
from services.gateway.tokenizer_client import TokenizerClient

MAX_KNOWN = 16_384
"""Most tokens remembered: about 2 MB."""
MAX_ASKED = 10_000
"""Most tokens that a tokenizer spells in one call."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI says this of a token that is next to impossible."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token with its log-probability."""

    spelling: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The token as text; of one that is no UTF-8 by itself, its bytes, so that no two tokens read the same."""
        try:
            return self.spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.spelling)


@dataclass(frozen=True, slots=True)
class Place:
    """One token's place in an answer: the token that was generated, and the most probable ones, best first."""

    chosen: Spelled
    top: tuple[Spelled, ...]


class Spelling:
    """Spells the tokens of deltas. Lives on one event loop."""

    def __init__(self, tokenizer: TokenizerClient) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    async def places(self, delta: inference_pb2.Delta) -> tuple[Place, ...]:
        """One for each token. None at all if a token's are missing: what a stream reads from the record has none.

        Raises what the tokenizers raise.
        """
        if len(delta.logprobs) != len(delta.token_ids):
            return ()
        wanted = set(delta.token_ids)
        for at_token in delta.logprobs:
            wanted.update(each.token_id for each in at_token.top)
        spellings = await self._spellings(wanted)
        return tuple(
            Place(
                _spelled(spellings, token_id, at_token.logprob),
                tuple(_spelled(spellings, each.token_id, each.logprob) for each in at_token.top),
            )
            for token_id, at_token in zip(delta.token_ids, delta.logprobs, strict=True)
        )

    async def _spellings(self, wanted: set[int]) -> Mapping[int, bytes]:
        # A copy of its own: while this waits, another may forget.
        spellings = {token_id: self._known[token_id] for token_id in wanted if token_id in self._known}
        unknown = [token_id for token_id in wanted if token_id not in spellings]
        for start in range(0, len(unknown), MAX_ASKED):
            asked = unknown[start : start + MAX_ASKED]
            found = dict(zip(asked, await self._tokenizer.spell(asked), strict=True))
            spellings.update(found)
            self._remember(found)
        return spellings

    def _remember(self, found: Mapping[int, bytes]) -> None:
        if len(self._known) + len(found) > MAX_KNOWN:
            self._known.clear()
        self._known.update(found)


def _spelled(spellings: Mapping[int, bytes], token_id: int, logprob: float) -> Spelled:
    return Spelled(spellings[token_id], max(logprob, LEAST_LOGPROB))
