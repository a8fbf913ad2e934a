"""How many calls this gateway takes, and what a caller is told at a limit."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from services.common.errors import Exhausted, ShoalError, Unavailable

BACKLOG_FULL = "BACKLOG_FULL"
RETRY_AFTER_MS = 1_000


class OpenCalls:
    """Counts calls that stream; refuses more than `limit`, and all while the gateway stops.

    `connection_limit`: most of one connection. `on_refusal` hears of each call that is refused.
    """

    def __init__(self, limit: int, connection_limit: int, on_refusal: Callable[[ShoalError], None]) -> None:
        self._limit = limit
        self._connection_limit = connection_limit
        self._on_refusal = on_refusal
        self._by_connection: Counter[str] = Counter()
        self._num_open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()
        self.draining = False

    def enter(self, context: Any, connection: str = "") -> None:
        """Count a call until it is done. Raises Exhausted, Unavailable.

        `connection`: by which it came; empty: by one that has no other call.
        """
        refusal = self._refusal(connection)
        if refusal is not None:
            self._on_refusal(refusal)
            raise refusal
        self._num_open += 1
        self._none_open.clear()
        if connection:
            self._by_connection[connection] += 1
        context.add_done_callback(lambda _: self._leave(connection))

    def _refusal(self, connection: str) -> ShoalError | None:
        if self.draining:
            return draining()
        if self._num_open >= self._limit:
            return Exhausted(
                f"this gateway has {self._num_open} open streams, the most is {self._limit}; use another, or wait",
                reason="TOO_MANY_STREAMS",
                retry_after_ms=RETRY_AFTER_MS,
            )
        if self._by_connection[connection] >= self._connection_limit:
            return Exhausted(
                f"this connection has {self._by_connection[connection]} open streams, the most is "
                f"{self._connection_limit}; open another, or wait",
                reason="TOO_MANY_STREAMS_OF_CONNECTION",
                retry_after_ms=RETRY_AFTER_MS,
            )
        return None

    async def all_done(self, within_s: float) -> bool:
        """Wait until no call is open. False: some still were after `within_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._none_open.wait()
        return self._none_open.is_set()

    def _leave(self, connection: str) -> None:
        self._num_open -= 1
        if connection:
            self._by_connection[connection] -= 1
            if not self._by_connection[connection]:
                del self._by_connection[connection]
        if not self._num_open:
            self._none_open.set()


class ShortCalls:
    """Counts calls that do not stream; refuses more than `limit`. Not while the gateway stops: one may be a Cancel."""

    def __init__(self, limit: int, on_refusal: Callable[[ShoalError], None]) -> None:
        """`on_refusal` hears of each call that is refused."""
        self._limit = limit
        self._on_refusal = on_refusal
        self._num_open = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call, counted until the block ends. Raises Exhausted."""
        if self._num_open >= self._limit:
            refusal = Exhausted(
                f"this gateway has {self._num_open} calls in progress that do not stream, the most is {self._limit}; "
                "come back later",
                reason="TOO_MANY_CALLS",
                retry_after_ms=RETRY_AFTER_MS,
            )
            self._on_refusal(refusal)
            raise refusal
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1


def backlog_full(length: int, limit: int) -> Exhausted:
    """What a caller is told when too many requests wait."""
    return Exhausted(
        f"{length} requests wait for a worker, and at most {limit} may; come back later",
        reason=BACKLOG_FULL,
        retry_after_ms=RETRY_AFTER_MS,
    )


def tenant_full(tenant: str, num_in_flight: int, limit: int) -> Exhausted:
    """What a caller is told when its tenant has as many requests in flight as its key allows."""
    return Exhausted(
        f"tenant {tenant!r} has {num_in_flight} requests in flight, and its API key allows {limit}; come back when one "
        "has ended",
        reason="TENANT_LIMIT",
        retry_after_ms=RETRY_AFTER_MS,
    )


def tokens_used_up(tenant: str, tokens: int, limit: int, wait_ms: int) -> Exhausted:
    """What a caller is told when its tenant has not so many tokens left in this minute as the request may take."""
    return Exhausted(
        f"the request may take {tokens} tokens (prompt, and max_tokens of each choice), and tenant {tenant!r} has "
        f"fewer left of the {limit} a minute that its key allows; come back in {wait_ms} ms, or ask for fewer",
        reason="TOKEN_LIMIT",
        retry_after_ms=wait_ms,
    )


def draining() -> Unavailable:
    """What a caller is told while the gateway stops."""
    return Unavailable(
        "this gateway stops; the request goes on: Attach at another gateway",
        reason="DRAINING",
        retry_after_ms=RETRY_AFTER_MS // 10,
    )
