"""Workers wanted: enough for the work in time, and at once; fewer only when it was quiet; never in turns."""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.demand import Bounds, Demand, Load, Offered, Startup, workers_needed

WITHIN_MS, QUIET_MS, LOOK_MS = 10_000.0, 60_000.0, 1_000.0


def bounds(least: int = 0, most: int = 20) -> Bounds:
    return Bounds(least, most, WITHIN_MS, QUIET_MS)


def a_demand(least: int = 0, most: int = 20, wanted: int = 0) -> Demand:
    return Demand(bounds(least, most), wanted, now_ms=0)


def work(workers: float, **fields: float) -> Load:
    """As much as so many workers do in time."""
    return Load(num_requests=1 if workers else 0, work_ms=workers * WITHIN_MS, ready=100, **fields)


def test_it_is_the_work_over_the_time_it_may_take() -> None:
    assert workers_needed(Load(5, work_ms=35_000, ready=5), within_ms=10_000) == 3.5


def test_what_runs_needs_its_room_however_little_is_left_to_do() -> None:
    assert workers_needed(Load(40, work_ms=1, occupied=2.5, ready=3), WITHIN_MS) == 2.5


def test_what_comes_all_the_time_needs_as_many_as_it_keeps_busy_and_some_idle_time() -> None:
    assert workers_needed(Load(1, work_ms=1, offered=3.4, ready=4), WITHIN_MS) == pytest.approx(4)


def test_new_workers_are_given_the_time_that_is_left_when_they_have_started() -> None:
    surplus = Load(100, work_ms=10_000 + 36_000, ready=1)
    assert workers_needed(surplus, WITHIN_MS) == pytest.approx(1 + 3.6)
    slow = Load(100, work_ms=10_000 + 36_000, ready=1, startup_ms=4_000)
    assert workers_needed(slow, WITHIN_MS) == pytest.approx(1 + 6.0)


def test_workers_that_start_too_late_anyhow_are_not_asked_for_without_end() -> None:
    late = Load(100, work_ms=46_000, ready=1, startup_ms=600_000)
    assert workers_needed(late, WITHIN_MS) == pytest.approx(1 + 7.2)


def test_the_first_request_wants_a_worker_though_nobody_knows_what_it_costs() -> None:
    assert a_demand().look(Load(num_requests=1), 0) == 1


def test_none_is_wanted_for_nothing_unless_some_always_are() -> None:
    assert a_demand(wanted=0).look(Load(0), 0) == 0
    assert a_demand(least=2, wanted=0).look(Load(0), 0) == 2


def test_it_adds_at_once_and_takes_away_only_after_the_quiet_time() -> None:
    demand = a_demand()
    assert demand.look(work(7.5), 0) == 8
    assert demand.look(work(0), 1_000) == 8
    assert demand.look(work(0), QUIET_MS) == 8
    assert demand.look(work(0), QUIET_MS + 1) == 0


def test_it_goes_down_to_the_most_that_was_needed_of_late() -> None:
    demand = a_demand()
    demand.look(work(8), 0)
    for now_ms, workers in ((20_000, 2), (30_000, 4), (40_000, 1), (61_000, 1)):
        demand.look(work(workers - 0.2), now_ms)
    assert demand.wanted == 4


def test_a_new_leader_gives_up_no_worker_before_it_has_seen_a_quiet_time_itself() -> None:
    demand = Demand(bounds(), wanted=5, now_ms=1_000_000)
    assert demand.look(work(0), 1_000_000 + QUIET_MS - 1) == 5
    assert demand.look(work(0), 1_000_000 + QUIET_MS) == 0


@given(st.floats(-0.09, 0.09), st.integers(1, 18))
def test_noise_at_the_border_of_two_numbers_changes_nothing(noise: float, workers: int) -> None:
    demand = a_demand()
    demand.look(work(workers), 0)
    before = demand.wanted
    for look in range(1, 200):
        demand.look(work(workers + noise * (-1) ** look), look * LOOK_MS)
        assert demand.wanted == before


loads = st.builds(
    Load,
    num_requests=st.integers(0, 3),
    work_ms=st.floats(0, 400_000),
    occupied=st.floats(0, 30),
    offered=st.floats(0, 30),
    ready=st.integers(0, 25),
    startup_ms=st.floats(0, 100_000),
).map(lambda load: load if load.num_requests else replace(load, occupied=0.0))  # Only requests occupy anything.
looks = st.lists(st.tuples(st.floats(1, 40_000), loads), min_size=1, max_size=40)


@given(looks, st.integers(0, 3), st.integers(3, 20))
def test_whatever_comes_its_rules_hold(history: list[tuple[float, Load]], least: int, most: int) -> None:
    demand, now_ms = a_demand(least, most), 0.0
    seen: list[tuple[float, float]] = []
    for passed_ms, load in history:
        now_ms += passed_ms
        before, wanted = demand.wanted, demand.look(load, now_ms)
        needed = workers_needed(load, WITHIN_MS) if load.num_requests else 0.0
        assert least <= wanted <= most
        assert wanted >= min(most, load.occupied), "never below what runs needs"
        assert wanted >= 1 or not load.num_requests, "a request always has a worker to wait for"
        assert wanted >= min(most, needed - 0.1)
        seen.append((now_ms, needed))
        if wanted < before:
            of_late = [need for at_ms, need in seen if at_ms >= now_ms - QUIET_MS]
            assert now_ms >= QUIET_MS
            assert wanted >= min(most, max(of_late)), "less than was needed within the quiet time"


# How long workers take to start ------------------------------------------------------------------------------------


def test_each_worker_that_comes_tells_how_long_the_longest_wait_was() -> None:
    startup = Startup()
    startup.look(wanted=1, ready=0, now_ms=0)
    startup.look(wanted=2, ready=0, now_ms=5_000)
    startup.look(wanted=2, ready=1, now_ms=8_000)
    assert startup.mean_ms == 8_000
    startup.look(wanted=2, ready=2, now_ms=13_000)
    assert startup.mean_ms == 8_000


def test_workers_that_nobody_waited_for_teach_nothing() -> None:
    startup = Startup()
    startup.look(wanted=0, ready=3, now_ms=0)
    startup.look(wanted=4, ready=3, now_ms=0)
    startup.look(wanted=3, ready=3, now_ms=10)
    startup.look(wanted=5, ready=5, now_ms=20)
    assert startup.mean_ms == 0


def test_a_worker_that_somebody_started_hours_later_teaches_nothing() -> None:
    startup = Startup(mean_ms=7_000)
    startup.look(wanted=1, ready=0, now_ms=0)
    startup.look(wanted=1, ready=1, now_ms=4 * 3_600_000)
    assert startup.mean_ms == 7_000


# Traces on virtual time --------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Workers that share out what runs, `holds` requests each at most, on virtual time.

    A request alone runs at half of a worker's speed, as a batch of one does, so few that run hide how busy it is.
    """

    least: int = 0
    most: int = 20
    startup_ms: float = 8_000
    holds: int = 8
    now_ms: float = 0
    ready: int = 0
    starting: deque[float] = field(default_factory=deque)
    requests: list[tuple[float, float]] = field(default_factory=list)
    """(accepted at, work left), in order; the first ones run."""
    waits_ms: list[float] = field(default_factory=list)
    """Of ended requests, from acceptance to end."""
    wanted: list[int] = field(default_factory=list)
    """At each look."""

    def __post_init__(self) -> None:
        self.ready = self.least
        self.demand = Demand(bounds(self.least, self.most), self.least, 0)
        self.offered, self.startup = Offered(QUIET_MS, 0), Startup()

    def run(self, for_ms: float, arrivals: Iterable[tuple[float, float]] = ()) -> "Pool":
        """`arrivals`: (time from now, work), in order."""
        coming = deque((self.now_ms + at_ms, work_ms) for at_ms, work_ms in arrivals)
        until_ms = self.now_ms + for_ms
        while self.now_ms < until_ms:
            arrived_ms = 0.0
            while coming and coming[0][0] <= self.now_ms:
                self.requests.append(coming.popleft())
                arrived_ms += self.requests[-1][1]
            self._look(arrived_ms)
            self._work()
            self.now_ms += LOOK_MS
        return self

    @property
    def changes(self) -> int:
        return sum(a != b for a, b in zip(self.wanted, self.wanted[1:], strict=False))

    def _look(self, arrived_ms: float) -> None:
        running, waiting = self.requests[: self._room], self.requests[self._room :]
        load = Load(
            num_requests=len(self.requests),
            work_ms=sum(left for _, left in [*waiting, *running]),
            occupied=len(running) / self.holds,
            offered=self.offered.look(arrived_ms, self.now_ms),
            ready=self.ready,
            startup_ms=self.startup.mean_ms,
        )
        wanted = self.demand.look(load, self.now_ms)
        self.wanted.append(wanted)
        while self.starting and self.starting[0] <= self.now_ms:
            self.starting.popleft()
            self.ready += 1
        while self.ready + len(self.starting) < wanted:
            self.starting.append(self.now_ms + self.startup_ms)
        self.ready = min(self.ready, wanted)
        self.startup.look(wanted, self.ready, self.now_ms)

    def _work(self) -> None:
        running = min(len(self.requests), self._room)
        each_ms = min(LOOK_MS * self.ready / running, LOOK_MS / 2) if running else 0.0
        left = [(at, work - each_ms if place < self._room else work) for place, (at, work) in enumerate(self.requests)]
        self.waits_ms += [self.now_ms - at_ms for at_ms, left_ms in left if left_ms <= 0]
        self.requests = [request for request in left if request[1] > 0]

    @property
    def _room(self) -> int:
        return self.ready * self.holds


def poisson(a_second: float, work_ms: float, for_ms: float, seed: int) -> list[tuple[float, float]]:
    rng, at_ms, arrivals = random.Random(seed), 0.0, []
    while (at_ms := at_ms + rng.expovariate(a_second / 1000)) < for_ms:
        arrivals.append((at_ms, work_ms * rng.uniform(0.5, 1.5)))
    return arrivals


def test_a_burst_adds_workers_and_quiet_drains_them() -> None:
    pool = Pool(least=1).run(200_000, [(0, 1_000.0)] * 60)
    assert max(pool.wanted) >= 6
    one_in_a_full_batch_ms = 1_000 * pool.holds
    assert max(pool.waits_ms) <= WITHIN_MS + pool.startup_ms + one_in_a_full_batch_ms
    assert len(pool.waits_ms) == 60
    assert pool.wanted[-1] == 1
    assert pool.changes <= 6, pool.wanted


def test_from_zero_a_request_waits_for_a_start_and_the_last_worker_goes_when_it_is_quiet() -> None:
    pool = Pool().run(20_000, [(2_000, 500.0)])
    assert pool.wanted[:4] == [0, 0, 1, 1]
    assert pool.waits_ms[0] <= pool.startup_ms + 2 * 500.0 + LOOK_MS
    assert pool.run(QUIET_MS).wanted[-1] == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("busy", [0.5, 1.3, 3.3, 7.6])
def test_steady_work_does_not_make_workers_come_and_go(busy: float, seed: int) -> None:
    pool = Pool(least=1).run(300_000, poisson(busy * 2, 500.0, 300_000, seed))
    pool.wanted.clear()
    pool.waits_ms.clear()
    pool.run(1_800_000, poisson(busy * 2, 500.0, 1_800_000, seed + 100))
    assert pool.changes <= 8, pool.wanted
    assert busy <= pool.ready <= 1.5 * busy + 1
    assert sum(wait_ms > WITHIN_MS for wait_ms in pool.waits_ms) <= 0.01 * len(pool.waits_ms)


@pytest.mark.parametrize("pause_ms", [5_000, 30_000, 55_000])
def test_pauses_shorter_than_the_quiet_time_take_no_worker_away(pause_ms: float) -> None:
    pool = Pool()
    burst = [(0.0, 1_000.0)] * 30
    pool.run(20_000, burst)
    most = pool.wanted[-1]
    for _ in range(10):
        pool.run(pause_ms, burst)
        assert pool.wanted[-1] >= most
