"""A reader that went away is told to Redis, whatever its request does."""

import asyncio

from redis.asyncio import Redis

from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.transitions import Answer, Verdict
from services.common.store.connection import Recovering
from services.common.store.requests import RequestStore
from services.gateway.departures import Departures


class StoreInRecovery(RequestStore):
    """Leaves are written while Redis is in recovery; nothing is cancelled."""

    def __init__(self) -> None:
        super().__init__(Redis(), "unused", 1)
        self.left: list[RequestKey] = []

    async def leave(self, move: moves.Leave) -> Answer:
        self.left.append(move.key)
        return Answer(Verdict.OK)

    async def cancel(self, move: moves.Cancel) -> Answer:
        raise Recovering("not yet")


async def test_a_request_that_cannot_be_cancelled_yet_holds_up_no_other_departure() -> None:
    store = StoreInRecovery()
    departures = Departures(store)
    departures.add(RequestKey("t/a"), 1, cancel={})
    departures.add(RequestKey("t/b"), 1)
    writing = asyncio.create_task(departures.run())
    assert await departures.flush(5)
    writing.cancel()
    assert store.left == ["t/a", "t/b"]
