"""Whether what a client says it holds joins what the fleet knows (docs/protocol.md, "Whose tokens count").

Tokens that a client holds and does not state are taken from the fleet: from the journal, and from a stream of this
gateway. Where those end before the first token that is stated, the request would be continued over a gap, perhaps with
another text than the client holds: refused, before anything has changed.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from services.common.errors import InvalidRequest
from services.common.ids import RequestKey
from services.common.record.history import NOTHING, Held, rebased
from services.common.record.record import Record
from services.common.record.states import ON_WORKER
from services.common.store.requests import RequestStore
from services.gateway.open_streams import OpenStreams
from services.gateway.store_retry import retried

JOURNAL_LAG_S = 1.0
"""A worker journals what it has sent within about 100 ms; longer than this is not waited."""
LOOK_S = 0.05


class Joining:
    """Completes claims of clients, or refuses them. `clock`: the loop's, in s."""

    def __init__(self, store: RequestStore, streams: OpenStreams, clock: Callable[[], float]) -> None:
        self._store = store
        self._streams = streams
        self._clock = clock

    async def joined(self, key: RequestKey, held: tuple[Held, ...]) -> tuple[Held, ...]:
        """The claims with every token stated; of a request that is unknown or has ended, as they are.

        Raises InvalidRequest if one leaves a gap; Unavailable while Redis is away.
        """
        until_s = self._clock() + JOURNAL_LAG_S
        while any(claim.start for claim in held):
            found = await retried(lambda: self._store.read(key))
            if found is None or found[0].ended:
                break
            record = found[0]
            known = [self._known(record, choice) for choice in range(min(len(held), record.num_choices))]
            gap = first_gap(known, held)
            if gap is None:
                return tuple(completed(claim, tokens) for claim, tokens in zip(held, known, strict=False))
            if record.state not in ON_WORKER or self._clock() >= until_s:
                raise refused(gap, held[gap], len(known[gap]))
            await asyncio.sleep(LOOK_S)
        return held

    def _known(self, record: Record, choice: int) -> tuple[int, ...]:
        """The longest beginning of a choice that the journal and a stream here give."""
        journal, stream = record.journal[choice], self._streams.get(record.key)
        given = stream.delivered()[choice] if stream is not None else NOTHING
        return max(journal, completed(given, journal).tokens if given.start <= len(journal) else (), key=len)


def completed(claim: Held, known: Sequence[int]) -> Held:
    """A claim that states all its tokens, those that the client leaves out as they are known; if they are."""
    return replace(claim, tokens=rebased(known, claim)) if claim.start <= len(known) else claim


def first_gap(known: Sequence[Sequence[int]], held: Sequence[Held]) -> int | None:
    """The first choice whose claim begins past what is known, or None."""
    pairs = enumerate(zip(known, held, strict=False))
    return next((choice for choice, (tokens, claim) in pairs if claim.start > len(tokens)), None)


def refused(choice: int, claim: Held, num_known: int) -> InvalidRequest:
    """What a client is told whose claim leaves a gap."""
    return InvalidRequest(
        f"from_index is {claim.count} with {len(claim.tokens)} held tokens, so the first that is stated has index "
        f"{claim.start}; the fleet knows only {num_known} tokens of choice {choice}. State the tokens held from index "
        f"{num_known} on, or attach from there",
        reason="HISTORY_GAP",
        field="held_token_ids" if choice == 0 else "points.held_token_ids",
    )
