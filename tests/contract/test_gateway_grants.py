"""Gateways share the backlog's room: what none of them has room for is refused before anything is encoded for it."""

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import Exhausted, Unavailable
from services.common.grants import LIFE_MS, Ask
from services.common.ids import GatewayId
from services.common.store.connection import connect
from services.common.store.grants import GrantStore
from services.common.store.keys import Keys
from services.gateway.backlog import FEW, REMEMBERED_S
from tests.conftest import RedisServer
from tests.contract.gateway_fleet import WITHIN_S, Answer, Fleet, RunningGateway
from tests.contract.http_answers import CHAT, an_http_user

LIMIT = 20


@pytest.fixture
async def gateways(fleet: Fleet) -> Sequence[RunningGateway]:
    return [await fleet.gateway(backlog_limit=LIMIT) for _ in range(2)]


async def outcome(answer: Answer) -> str:
    """`accepted`, or how it was refused."""
    try:
        await answer.accepted()
    except (Exhausted, Unavailable) as error:
        return f"{error.code.name} {error.reason}{' and when to come back' if error.retry_after_ms else ''}"
    return "accepted"


REFUSED = "RESOURCE_EXHAUSTED BACKLOG_FULL and when to come back"


async def until_accepted(gateway: RunningGateway) -> None:
    """Ask until a request is accepted."""
    async with asyncio.timeout(WITHIN_S):
        while await outcome(gateway.generate()) != "accepted":
            await asyncio.sleep(REMEMBERED_S)


async def fill(fleet: Fleet, gateway: RunningGateway) -> None:
    """Ask until the backlog is full. A refusal may come a moment early: what another gateway stated counts for it."""
    async with asyncio.timeout(WITHIN_S):
        while await fleet.redis.xlen(Keys(fleet.pool).intake) < LIMIT:
            await outcome(gateway.generate())


async def until_taken(fleet: Fleet, number: int) -> None:
    """Wait until gateways have stated so many calls on their way, those in the backlog counted in."""
    nobody = Ask(GatewayId("127.0.0.1:1#nobody"), 0, 0, LIMIT)
    async with asyncio.timeout(WITHIN_S):
        while (await GrantStore(fleet.redis, fleet.pool).ask(nobody)).num_taken != number:
            await asyncio.sleep(0.01)


async def test_of_a_flood_over_two_gateways_the_surplus_is_refused_while_the_rest_is_not_yet_encoded(
    fleet: Fleet, gateways: Sequence[RunningGateway]
) -> None:
    fleet.tokenizer.hold()
    outcomes = [asyncio.create_task(outcome(gateway.generate())) for _ in range(200) for gateway in gateways]
    surplus = len(outcomes) - LIMIT - len(gateways) * FEW
    async with asyncio.timeout(WITHIN_S):
        while sum(each.done() for each in outcomes) < surplus:
            await asyncio.sleep(0.01)
    assert {each.result() for each in outcomes if each.done()} == {REFUSED}
    fleet.tokenizer.let_go()
    assert Counter(await asyncio.gather(*outcomes)) == {"accepted": LIMIT, REFUSED: 2 * 200 - LIMIT}
    assert fleet.tokenizer.num_encoded <= LIMIT + len(gateways) * FEW


async def test_where_another_gateway_has_filled_the_backlog_one_call_is_encoded_at_most(
    fleet: Fleet, gateways: Sequence[RunningGateway]
) -> None:
    one, other = gateways
    assert await outcome(other.generate()) == "accepted"
    await fill(fleet, one)
    num_encoded = fleet.tokenizer.num_encoded
    for _ in range(10):
        assert await outcome(other.generate()) == REFUSED
        await asyncio.sleep(REMEMBERED_S)
    assert fleet.tokenizer.num_encoded <= num_encoded + 1


async def test_http_is_refused_so_too(fleet: Fleet, gateways: Sequence[RunningGateway]) -> None:
    one, other = gateways
    await fill(fleet, one)
    num_encoded = fleet.tokenizer.num_encoded
    async for user in an_http_user():
        for _ in range(3):
            response = await user.post(other.addresses, CHAT)
            assert (response.status, (await response.json())["error"]["code"]) == (429, "backlog_full")
            assert response.headers["Retry-After"] == "1"
    assert fleet.tokenizer.num_encoded == num_encoded


async def test_room_that_one_gateways_requests_leave_is_anothers(
    fleet: Fleet, gateways: Sequence[RunningGateway]
) -> None:
    one, other = gateways
    accepted = [await one.generate().accepted() for _ in range(LIMIT)]
    assert await outcome(other.generate()) == REFUSED
    for request_id in accepted:
        await fleet.place(fleet.key(request_id))
    for _ in range(LIMIT):
        await until_accepted(other)


async def test_calls_that_were_let_in_and_fail_leave_their_room(
    fleet: Fleet, gateways: Sequence[RunningGateway]
) -> None:
    one, other = gateways
    fleet.tokenizer.hold()
    calls = [one.generate() for _ in range(LIMIT)]
    await until_taken(fleet, LIMIT)
    assert await outcome(other.generate()) == REFUSED
    for answer in calls:
        answer.call.cancel()
    await until_taken(fleet, 0)
    fleet.tokenizer.let_go()
    await until_accepted(other)


async def test_what_a_gateway_that_died_had_let_in_comes_back_soon(
    fleet: Fleet, gateways: Sequence[RunningGateway]
) -> None:
    dead = Ask(GatewayId("127.0.0.1:1#dead"), LIMIT, 0, LIMIT)
    await GrantStore(fleet.redis, fleet.pool).ask(dead)
    assert await outcome(gateways[0].generate()) == REFUSED
    async with asyncio.timeout(LIFE_MS / 1000 + WITHIN_S):
        await until_accepted(gateways[0])


async def test_with_redis_away_calls_are_told_so_and_when_it_is_back_what_was_let_in_is_stored(
    own_redis_server: RedisServer, pool: str
) -> None:
    client = await connect(own_redis_server.url)
    async with Fleet(client, own_redis_server.url, pool) as fleet:
        gateways = [await fleet.gateway(backlog_limit=LIMIT) for _ in range(2)]
        fleet.tokenizer.hold()
        held = [asyncio.create_task(outcome(gateway.generate())) for _ in range(8) for gateway in gateways]
        async with asyncio.timeout(WITHIN_S):
            while fleet.tokenizer.num_waiting < len(gateways):
                await asyncio.sleep(0.01)
        own_redis_server.kill()
        assert await outcome(gateways[0].generate(token_ids=pb.TokenIds(ids=[5]))) == (
            "UNAVAILABLE STORE_UNAVAILABLE and when to come back"
        )
        own_redis_server.start()
        await fleet.lead()
        fleet.tokenizer.let_go()
        assert Counter(await asyncio.gather(*held)) == {"accepted": 16}
        for gateway in gateways:
            await until_accepted(gateway)
    await client.aclose()
