"""Gateways that ask share the backlog's room: all of it, no more than it, and none waits long for one that died."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from services.common.grants import LIFE_MS, Ask, Grant, Stated, granted
from services.common.ids import GatewayId

A, B = GatewayId("a#1"), GatewayId("b#1")


@dataclass
class Pool:
    """Gateways that submit only what they were granted, and state what they have at least every LIFE_MS."""

    limit: int
    backlog: int = 0
    now_ms: int = 1_000
    stated: dict[GatewayId, Stated] = field(default_factory=dict)
    on_their_way: dict[GatewayId, int] = field(default_factory=lambda: {A: 0, B: 0, GatewayId("c#1"): 0})

    def ask(self, gateway: GatewayId, wanted: int) -> Grant:
        ask = Ask(gateway, self.on_their_way.get(gateway, 0), wanted, self.limit)
        grant, self.stated = granted(ask, self.stated, self.backlog, self.now_ms)
        self.on_their_way[gateway] = ask.num_on_their_way + grant.num_granted
        return grant

    def submit(self, gateway: GatewayId) -> None:
        if self.on_their_way[gateway]:
            self.on_their_way[gateway] -= 1
            self.backlog += 1

    def leave(self, gateway: GatewayId) -> None:
        """A call that was let in is found to be invalid, or its client hangs up."""
        self.on_their_way[gateway] = max(0, self.on_their_way[gateway] - 1)

    def place(self, number: int) -> None:
        self.backlog = max(0, self.backlog - number)

    def wait(self, ms: int) -> None:
        for gateway in self.on_their_way:
            self.ask(gateway, 0)
        self.now_ms += min(ms, LIFE_MS - 1)

    def die(self, gateway: GatewayId) -> None:
        self.on_their_way[gateway] = 0

    @property
    def num_total(self) -> int:
        return self.backlog + sum(self.on_their_way.values())


histories = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "submit", "submit", "leave", "place", "wait", "die"]),
        st.integers(0, 2),
        st.integers(0, 30),
    ),
    max_size=60,
)


def happen(pool: Pool, history: list[tuple[str, int, int]]) -> None:
    for what, which, number in history:
        gateway = list(pool.on_their_way)[which]
        match what:
            case "ask":
                pool.ask(gateway, number)
            case "place":
                pool.place(number)
            case "wait":
                pool.wait(number * 100)
            case _:
                getattr(pool, what)(gateway)
        assert pool.num_total <= pool.limit


@given(limit=st.integers(1, 40), history=histories)
def test_what_is_granted_and_what_waits_are_never_more_than_the_limit(
    limit: int, history: list[tuple[str, int, int]]
) -> None:
    happen(Pool(limit), history)


@given(limit=st.integers(1, 40), history=histories, wanted=st.integers(0, 50))
def test_once_all_have_stated_what_they_have_all_room_is_granted(
    limit: int, history: list[tuple[str, int, int]], wanted: int
) -> None:
    pool = Pool(limit)
    happen(pool, history)
    pool.wait(0)
    room = limit - pool.num_total
    assert pool.ask(A, wanted).num_granted == min(wanted, room)


def test_what_a_gateway_that_died_was_granted_comes_back_within_its_life() -> None:
    pool = Pool(limit=10)
    assert pool.ask(A, 10).num_granted == 10
    pool.die(A)
    pool.now_ms += LIFE_MS - 1
    assert pool.ask(B, 1).num_granted == 0
    pool.now_ms += 1
    assert pool.ask(B, 10).num_granted == 10


def test_a_gateway_that_asks_again_is_not_in_its_own_way() -> None:
    pool = Pool(limit=10)
    pool.ask(A, 6)
    assert pool.ask(A, 6) == Grant(num_granted=4, num_taken=6)


def test_a_backlog_that_is_longer_than_the_limit_grants_nothing() -> None:
    pool = Pool(limit=10, backlog=12)
    assert pool.ask(A, 3) == Grant(num_granted=0, num_taken=12)
    assert not pool.stated
