"""Work waits while a flood of calls is being refused: until it is over, and for a moment at most."""

import asyncio
import time

import pytest

from services.gateway.calm import LONGEST_S, LOOK_S, REST_S, Calm

WITHIN_S = 10.0


class Gateway:
    """Refuses calls, and has work to do."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.calm = Calm(lambda: self.now_s)

    def work(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.calm.wait())

    async def refuse_while(self, working: "asyncio.Task[None]") -> None:
        """Calls are refused without an end, and the clock stands still."""
        async with asyncio.timeout(WITHIN_S):
            while not working.done():
                self.calm.note_refusal()
                await asyncio.sleep(0)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


async def at_once(gateway: Gateway) -> bool:
    """Whether work that comes now goes on."""
    working = gateway.work()
    await asyncio.sleep(0)
    went_on = working.done()
    working.cancel()
    return went_on


async def done(working: "asyncio.Task[None]") -> None:
    async with asyncio.timeout(WITHIN_S):
        await working


async def test_work_goes_on_at_once_where_nothing_is_refused(gateway: Gateway) -> None:
    assert await at_once(gateway)


async def test_work_waits_until_no_more_calls_are_refused(gateway: Gateway) -> None:
    for _ in range(2):
        gateway.calm.note_refusal()
        assert not await at_once(gateway)
        await done(gateway.work())
        gateway.now_s += REST_S


async def test_refusals_now_and_then_do_not_stop_work(gateway: Gateway) -> None:
    gateway.calm.note_refusal()
    await done(gateway.work())
    gateway.now_s += 0.9 * REST_S
    gateway.calm.note_refusal()
    assert await at_once(gateway)
    gateway.now_s += 0.2 * REST_S
    gateway.calm.note_refusal()
    assert not await at_once(gateway)


async def test_a_flood_that_does_not_end_holds_up_work_once(gateway: Gateway) -> None:
    gateway.calm.note_refusal()
    working = gateway.work()
    refusing = asyncio.create_task(gateway.refuse_while(working))
    await asyncio.sleep(5 * LOOK_S)
    assert not working.done(), "by the gateway's clock no time has passed"
    gateway.now_s += LONGEST_S
    await refusing
    gateway.now_s += 2 * REST_S
    gateway.calm.note_refusal()
    assert await at_once(gateway), "the same flood"


async def test_calls_that_waited_for_a_long_turn_of_the_event_loop_belong_to_the_flood(gateway: Gateway) -> None:
    gateway.calm.note_refusal()
    working = gateway.work()
    for _ in range(5):
        for _ in "a look that finds a refusal", "one before the calls that waited":
            time.sleep(2 * LOOK_S)  # noqa: ASYNC251 - the event loop shall stand still
            for _ in range(3):
                await asyncio.sleep(0)
        assert not working.done()
        gateway.calm.note_refusal()
