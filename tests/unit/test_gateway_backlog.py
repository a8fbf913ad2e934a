"""A gateway lets calls in while there is room, asks once for all that wait, and refuses at once where there is none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest

from services.common.errors import Exhausted
from services.common.grants import Grant
from services.common.store.connection import StoreUnavailable
from services.gateway import backlog
from services.gateway.backlog import FEW, REMEMBERED_S, STALE_S, Arrival, Backlog

WITHIN_S = 10.0
LIMIT = 20


class Redis:
    """The backlog, and what the gateway asked. Answers when it is told to."""

    def __init__(self) -> None:
        self.length = 0
        self.is_away = False
        self.asked: list[tuple[int, int]] = []
        """On their way, and wanted."""
        self.answers = asyncio.Event()
        self.answers.set()
        self.heard = asyncio.Condition()

    async def ask(self, num_on_their_way: int, num_wanted: int) -> Grant:
        self.asked.append((num_on_their_way, num_wanted))
        async with self.heard:
            self.heard.notify_all()
        await self.answers.wait()
        if self.is_away:
            raise StoreUnavailable("away")
        num_taken = self.length + num_on_their_way
        return Grant(max(0, min(num_wanted, LIMIT - num_taken)), num_taken)

    async def until_asked(self, num_times: int) -> None:
        async with asyncio.timeout(WITHIN_S), self.heard:
            await self.heard.wait_for(lambda: len(self.asked) >= num_times)


class Gateway:
    """A backlog under test, and the calls that it let in."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.now_s = 1_000.0
        self.backlog = Backlog(redis.ask, LIMIT, lambda: self.now_s)
        self.let_in: list[Arrival] = []
        self.refusals: list[Exhausted] = []
        self._calls = ExitStack()

    async def call(self) -> bool:
        """A call comes. Whether it is let in."""
        arrival = self._calls.enter_context(self.backlog.arrival())
        try:
            await self.backlog.let_in(arrival)
        except Exhausted as error:
            self.refusals.append(error)
            return False
        self.let_in.append(arrival)
        return True

    async def calls(self, number: int) -> int:
        """So many at once. How many are let in."""
        async with asyncio.timeout(WITHIN_S):
            return sum(await asyncio.gather(*(self.call() for _ in range(number))))

    def submit(self, number: int) -> None:
        """The first that were let in are stored."""
        for arrival in self.let_in[:number]:
            self.backlog.submitting(arrival)
        del self.let_in[:number]
        self.redis.length += number


@asynccontextmanager
async def a_gateway(redis: Redis) -> AsyncIterator[Gateway]:
    gateway = Gateway(redis)
    running = asyncio.create_task(gateway.backlog.run())
    yield gateway
    running.cancel()


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with a_gateway(Redis()) as gateway:
        yield gateway


async def test_few_calls_at_a_time_ask_nobody_once_room_is_known(gateway: Gateway) -> None:
    for _ in range(LIMIT - 1):
        assert await gateway.call()
        gateway.submit(1)
        gateway.redis.length = 0
    assert gateway.redis.asked == [(0, 1)]


async def test_more_than_a_few_on_their_way_are_asked_for(gateway: Gateway) -> None:
    for _ in range(FEW):
        assert await gateway.call()
    assert gateway.redis.asked == [(0, 1)]
    assert await gateway.call()
    assert gateway.redis.asked[1:] == [(FEW, 1)]


async def test_what_it_lets_in_by_itself_is_never_more_than_the_room_it_knew_of(gateway: Gateway) -> None:
    gateway.redis.length = LIMIT - 3
    for _ in range(3):
        assert await gateway.call()
        gateway.submit(1)
    assert not await gateway.call()
    assert gateway.redis.asked == [(0, 1), (0, 1)]


async def test_all_calls_that_wait_are_asked_for_together_and_the_first_get_the_room(gateway: Gateway) -> None:
    gateway.redis.answers.clear()
    calls = [asyncio.create_task(gateway.call()) for _ in range(10)]
    await gateway.redis.until_asked(1)
    gateway.redis.length = LIMIT - 6
    gateway.redis.answers.set()
    assert [await call for call in calls] == [True] * 6 + [False] * 4
    assert gateway.redis.asked[0] == (0, 10)


async def test_a_flood_gets_all_the_room_there_is_and_its_rest_is_refused_by_few_questions(gateway: Gateway) -> None:
    gateway.redis.length = 5
    assert await gateway.calls(2_000) == LIMIT - 5
    assert {(error.reason, error.retry_after_ms > 0) for error in gateway.refusals} == {("BACKLOG_FULL", True)}
    assert sum(wanted > 0 for _, wanted in gateway.redis.asked) <= 2


async def test_a_flood_finds_the_rest_of_the_room_while_its_first_calls_are_being_stored(gateway: Gateway) -> None:
    assert await gateway.calls(5) == 5
    gateway.submit(3)
    assert await gateway.calls(100) == LIMIT - 5
    gateway.submit(4)
    gateway.now_s += 2 * REMEMBERED_S
    assert await gateway.calls(100) == 0


async def test_no_room_is_remembered_for_a_moment_and_then_room_is_seen_again(gateway: Gateway) -> None:
    gateway.redis.length = LIMIT
    assert not await gateway.call()
    gateway.redis.length = 0
    gateway.now_s += REMEMBERED_S * 0.9
    assert not await gateway.call()
    assert len(gateway.redis.asked) == 1
    gateway.now_s += REMEMBERED_S * 0.2
    assert await gateway.call()


async def test_while_one_asks_whether_there_is_room_again_others_are_refused_by_the_last_answer(
    gateway: Gateway,
) -> None:
    gateway.redis.length = LIMIT
    assert not await gateway.call()
    gateway.now_s += 2 * REMEMBERED_S
    gateway.redis.answers.clear()
    asking = asyncio.create_task(gateway.call())
    await gateway.redis.until_asked(2)
    assert not await gateway.call()
    gateway.now_s += STALE_S
    waiting = asyncio.create_task(gateway.call())
    await asyncio.sleep(0)
    gateway.redis.length = 0
    gateway.redis.answers.set()
    assert await asking
    assert await waiting, "that answer was too old"


async def test_behind_a_submit_that_found_the_backlog_full_calls_are_refused_before_any_work(gateway: Gateway) -> None:
    assert await gateway.call()
    gateway.redis.length = LIMIT
    gateway.backlog.found_full()
    assert not await gateway.call()
    gateway.now_s += 2 * REMEMBERED_S
    assert not await gateway.call()


async def test_work_for_calls_that_were_let_in_waits_until_no_more_are_refused(gateway: Gateway) -> None:
    await gateway.backlog.calm()
    assert await gateway.calls(LIMIT + 1) == LIMIT
    working = asyncio.create_task(gateway.backlog.calm())
    await asyncio.sleep(0)
    assert not working.done()
    async with asyncio.timeout(WITHIN_S):
        await working


async def test_what_others_know_of_calls_on_their_way_is_renewed_until_there_are_none(gateway: Gateway) -> None:
    assert await gateway.calls(10) == 10
    gateway.submit(8)
    await gateway.redis.until_asked(2)
    assert gateway.redis.asked[1] == (2, 0)
    gateway.submit(2)
    await gateway.redis.until_asked(len(gateway.redis.asked) + 1)
    assert gateway.redis.asked[-1] == (0, 0)
    num_asked = len(gateway.redis.asked)
    await asyncio.sleep(2 * backlog.STATED_AGAIN_S)
    assert len(gateway.redis.asked) == num_asked


async def test_a_call_that_ends_early_gives_its_place_back(gateway: Gateway) -> None:
    with gateway.backlog.arrival() as arrival:
        await gateway.backlog.let_in(arrival)
    assert await gateway.calls(LIMIT + 1) == LIMIT


async def test_callers_that_hang_up_while_they_wait_take_nothing(gateway: Gateway) -> None:
    gateway.redis.answers.clear()
    early, late = (asyncio.create_task(gateway.call()) for _ in range(2))
    await gateway.redis.until_asked(1)
    early.cancel()
    gateway.redis.answers.set()
    assert await late
    await asyncio.gather(early, return_exceptions=True)
    assert await gateway.calls(LIMIT) == LIMIT - 1


async def test_a_caller_that_hangs_up_as_it_is_let_in_takes_nothing(gateway: Gateway) -> None:
    async def call() -> None:
        with gateway.backlog.arrival() as arrival:
            await gateway.backlog.let_in(arrival)

    gateway.redis.answers.clear()
    calling = asyncio.create_task(call())
    await gateway.redis.until_asked(1)
    gateway.redis.answers.set()
    # Behind the step that takes the answer, and before the one in which the caller hears of it.
    asyncio.get_running_loop().call_soon(calling.cancel)
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await gateway.calls(LIMIT + 1) == LIMIT


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "ANSWER_LIMIT_S", 0.05)


@pytest.mark.parametrize("silent", [False, True])
async def test_without_redis_calls_go_on_and_are_told_by_the_submit_but_no_more_than_the_limit(
    gateway: Gateway, silent: bool, impatience: None
) -> None:
    gateway.redis.is_away = True
    if silent:
        gateway.redis.answers.clear()
    assert await gateway.calls(50) == LIMIT
    gateway.submit(LIMIT)
    gateway.redis.is_away, gateway.redis.length = False, 0
    gateway.redis.answers.set()
    assert await gateway.calls(3) == 3
