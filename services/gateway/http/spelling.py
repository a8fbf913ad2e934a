"""What single tokens say, for log-probabilities: asked of the tokenizers once, and remembered."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gen.shoal.inference.v1 import inference_pb2
from services.gateway.tokenizer_client import TokenizerClient

MAX_KNOWN = 16_384
"""Most tokens remembered: about 2 MB."""
MAX_ASKED = 10_000
"""Most tokens that a tokenizer spells in one call."""
MAX_PLACES = 64
"""Most places made at once: with 20 tokens each, they hold the event loop for 3 ms until they are JSON."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI says this of a token that is next to impossible."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token with its log-probability, which the first of a prompt has none of."""

    spelling: bytes
    logprob: float | None

    @property
    def text(self) -> str:
        """The token as text; of one that is no UTF-8 by itself, its bytes, so that no two tokens read the same."""
        try:
            return self.spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.spelling)


@dataclass(frozen=True, slots=True)
class Place:
    """One token's place in a text: the token that stands there, and the most probable ones, best first."""

    chosen: Spelled
    top: tuple[Spelled, ...]


Places = Sequence[Place]


class Spelling:
    """Spells the tokens of requests. Lives on one event loop. All methods raise what the tokenizers raise."""

    def __init__(self, tokenizer: TokenizerClient) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    async def text(self, token_ids: Sequence[int]) -> str:
        """All of these, special ones by their names."""
        spellings = await self._spellings(set(token_ids))
        return b"".join(spellings[token_id] for token_id in token_ids).decode(errors="replace")

    async def first_of_prompt(self, token_id: int) -> Place:
        """The place that nothing is before."""
        return Place(Spelled((await self._spellings({token_id}))[token_id], None), ())

    async def places(
        self, token_ids: Sequence[int], logprobs: Sequence[inference_pb2.TokenLogprobs]
    ) -> AsyncIterator[Places]:
        """One place for each token, MAX_PLACES at a time; at least one time."""
        for start in range(0, len(token_ids) or 1, MAX_PLACES):
            if start:
                await asyncio.sleep(0)  # Others have their turn.
            chosen, at = token_ids[start : start + MAX_PLACES], logprobs[start : start + MAX_PLACES]
            spellings = await self._spellings({*chosen, *(each.token_id for one in at for each in one.top)})
            yield [
                Place(
                    _spelled(spellings, token_id, one.logprob),
                    tuple(_spelled(spellings, each.token_id, each.logprob) for each in one.top),
                )
                for token_id, one in zip(chosen, at, strict=True)
            ]

    async def _spellings(self, wanted: Iterable[int]) -> Mapping[int, bytes]:
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
