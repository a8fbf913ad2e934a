"""One seed: a fleet, its requests, its faults, its verdict."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from services.common.ids import RequestKey
from services.common.record.states import IllegalTransitionError
from simulator.protocol.checks import Checks, Violation
from simulator.protocol.client import Client, Habits
from simulator.protocol.commands import Spec
from simulator.protocol.faults import Fleet, Plan
from simulator.protocol.gateway import Gateway
from simulator.protocol.leader import Leader
from simulator.protocol.links import Network
from simulator.protocol.redis_model import RedisModel
from simulator.protocol.text import ENDLESS, Texts
from simulator.protocol.timing import draw_timing
from simulator.protocol.worker import Worker
from simulator.protocol.world import Process, World

LIMIT_MS = 60_000
"""Virtual time after which whatever has not ended never will."""
AWAY_SLACK_MS = 100
"""Who comes back so long before its resume time ends comes in time."""
LINGER_MS = 400
"""What is still under way when all has ended gets this long to do harm."""
QUOTA_EACH = 5
"""In the last of so many seeds, the tenant may have only QUOTA requests in flight; in the one before, QUOTA_TOKENS."""
QUOTA = 2
QUOTA_TOKENS = 120
"""A minute."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a schedule showed. `violation` is empty if every invariant held."""

    seed: int
    violation: str
    stats: Counter[str]
    ended_at_ms: float


def run_schedule(seed: int, trace: Callable[[str], None] | None = None, only: Sequence[str] = ()) -> Verdict:
    """Run one schedule to its end. The same seed always gives the same schedule.

    `only`: the kinds of faults that may happen, as `faults.KINDS` names them; at least one does. Empty: all kinds.
    """
    rng = Random(seed)
    world = World(rng, trace)
    texts = Texts(rng, alike=rng.random() < 0.25)
    checks = Checks(world, texts)
    fleet = _fleet(world, checks)
    plan = Plan(fleet, rng, Process(world, "faults"))
    violation = ""
    try:
        fleet.redis.up = True
        _limit_the_tenant(fleet, seed)
        for process in (*fleet.gateways, *fleet.leaders, *fleet.workers):
            process.start()
        _requests(fleet, rng, checks)
        plan.draw(only)
        watcher = Process(world, "watcher")
        world.after(100, watcher, _stop_when_over, fleet, plan, checks, watcher)
        world.run(LIMIT_MS)
        checks.at_end(
            fleet.redis.data,
            fleet.clients,
            fleet.workers,
            plan.kinds,
        )
    except (Violation, IllegalTransitionError) as error:
        violation = f"{type(error).__name__}: {error}"
    except Exception as error:
        raise RuntimeError(f"seed {seed}: a defect of the simulation itself") from error
    return Verdict(seed, violation, world.stats, world.now)


def _fleet(world: World, checks: Checks) -> Fleet:
    redis = RedisModel(world, checks)
    network = Network(world)
    gateways = [Gateway(world, f"gateway{number}", checks) for number in (1, 2)]
    leaders = [Leader(world, f"leader{number}") for number in (1, 2)]
    addresses = {gateway.name: gateway for gateway in gateways}
    timing = draw_timing(world.rng)
    num_workers = world.rng.choice((2, 2, 3))
    workers = [Worker(world, f"worker{n}", checks, network, addresses) for n in range(1, num_workers + 1)]
    network.timing = timing
    for leader in leaders:
        leader.room, leader.window = timing.room, timing.window
    for gateway in gateways:
        gateway.timing = timing
    for worker in workers:
        worker.timing = timing
    for process in (*gateways, *leaders, *workers):
        process.serve = redis.submit
    return Fleet(world, redis, network, gateways, leaders, workers, [])


def _limit_the_tenant(fleet: Fleet, seed: int) -> None:
    for gateway in fleet.gateways:
        gateway.tenant_limit = QUOTA if seed % QUOTA_EACH == QUOTA_EACH - 1 else 0
        gateway.tokens_per_minute = QUOTA_TOKENS if seed % QUOTA_EACH == QUOTA_EACH - 2 else 0


def _requests(fleet: Fleet, rng: Random, checks: Checks) -> None:
    for number in range(rng.choice((2, 3, 3, 4, 5))):
        key = RequestKey(f"t/r{number}")
        kind = rng.random()
        poison_after = rng.randrange(12) if kind < 0.08 else -1
        endless = 0.08 <= kind < 0.16
        max_tokens = ENDLESS if endless else rng.choice((1, 8, 20, 40, 60, 100))
        spec = Spec(max_tokens, 2 if rng.random() < 0.15 else 1, poison_after)
        checks.specs[key] = spec
        client = Client(fleet.world, f"client{number}", checks, fleet.gateways, key, spec, _habits(rng, endless))
        fleet.clients.append(client)
        begins_at = rng.uniform(5, 900)
        fleet.world.after(begins_at, client, client.start)
        if fleet.gateways[0].tenant_limit:
            client.expected_ends.add("quota")
        if fleet.gateways[0].tokens_per_minute:
            client.expected_ends.add("tokens")
        if poison_after >= 0:
            client.expected_ends.add("quarantined")
        if client.habits.deadline_ms:
            client.expected_ends.add("expired")
        if client.habits.cancel_after_ms:
            client.expected_ends.add("cancelled")
        if client.habits.hang_up_at_tokens >= 0:
            client.expected_ends.add("gone")
            if client.habits.away_ms > client.habits.resume_ms - AWAY_SLACK_MS:
                client.expected_ends.add("cancelled")
        if rng.random() < 0.25:
            twin = Client(fleet.world, f"twin{number}", checks, fleet.gateways, key, spec, _twin_habits(endless))
            delay = begins_at + rng.uniform(50, 1500)
            fleet.world.after(
                delay,
                twin,
                _begin_twin,
                fleet,
                twin,
                client,
                rng.choice((0.0, rng.uniform(0, 200), rng.uniform(0, 1500))),
            )


def _begin_twin(fleet: Fleet, twin: Client, first: Client, lag_ms: float) -> None:
    if not first.accepted or first.end:
        return
    copy = Client(fleet.world, twin.name, twin.checks, twin.gateways, twin.key, twin.spec, twin.habits)
    copy.held, copy.chains = [list(tokens) for tokens in first.held], list(first.chains)

    def attach() -> None:
        fleet.clients.append(twin)
        twin.checks.twins.add(twin.key)
        twin.attach_as_twin_of(copy)
        first.expected_ends.add("superseded")
        twin.expected_ends = set(first.expected_ends)
        if first.habits.hang_up_at_tokens >= 0 or twin.habits.cancel_after_ms:
            # Nobody may have read it before this one came, or this one ends it.
            twin.expected_ends.add("cancelled")
            first.expected_ends.add("cancelled")

    fleet.world.after(lag_ms, twin, attach)


def _twin_habits(endless: bool) -> Habits:
    return Habits(cancel_after_ms=1000.0 if endless else 0.0)


def _habits(rng: Random, endless: bool) -> Habits:
    own_id = rng.random() < 0.5
    deadline_ms = rng.choice((300, 1500, 5000)) if rng.random() < 0.15 else 0
    resume_ms = 4000 if own_id else rng.choice((300, 1500))
    hang_up_at, hops, away_ms, cancel_after_ms = -1, 0, 0.0, 0.0
    habit = rng.random()
    if habit < 0.35:
        hang_up_at = rng.randrange(12)
        hops = rng.choice((0, 1, 2, 3)) if not endless else 0
        away_ms = rng.choice((rng.uniform(1, 100), rng.uniform(1, 2500)))
    elif habit < 0.43:
        cancel_after_ms = rng.uniform(5, 1500)
    if endless and not cancel_after_ms and hang_up_at < 0 and not deadline_ms:
        cancel_after_ms = rng.choice((rng.uniform(500, 1500), 6500.0))
    return Habits(own_id, deadline_ms, resume_ms, hang_up_at, hops, away_ms, cancel_after_ms)


def _stop_when_over(fleet: Fleet, plan: Plan, checks: Checks, watcher: Process) -> None:
    world = fleet.world
    if world.now > plan.over_at and checks.all_ended(fleet.redis.data, fleet.clients):
        world.after(LINGER_MS, watcher, _stop, fleet, plan, checks, watcher)
    else:
        world.after(100, watcher, _stop_when_over, fleet, plan, checks, watcher)


def _stop(fleet: Fleet, plan: Plan, checks: Checks, watcher: Process) -> None:
    if checks.all_ended(fleet.redis.data, fleet.clients) and not any(worker.jobs for worker in fleet.workers):
        fleet.world.stopped = True
    else:
        fleet.world.after(100, watcher, _stop_when_over, fleet, plan, checks, watcher)
