"""What goes wrong in a schedule, drawn from its seed before it begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from services.common.ids import fleet_address
from services.common.record import moves
from simulator.protocol.client import Client, Habits
from simulator.protocol.gateway import Gateway
from simulator.protocol.leader import Leader
from simulator.protocol.links import Network
from simulator.protocol.redis_model import RedisModel
from simulator.protocol.text import ENDLESS
from simulator.protocol.worker import Worker
from simulator.protocol.world import Process, World

FAULTS_MS = (30.0, 1900.0)
"""When faults begin."""
KINDS: Mapping[str, int] = {
    "crash_worker": 2,
    "crash_gateway": 2,
    "crash_leader": 1,
    "kill_engine": 2,
    "stall_engine": 1,
    "freeze_worker": 2,
    "freeze_gateway": 1,
    "freeze_leader": 1,
    "zombie": 2,
    "partition": 2,
    "slow_link": 2,
    "overtake": 1,
    "redis_trouble": 2,
    "cut_from_redis": 1,
    "restart_redis": 1,
    "restart_redis_unheard": 1,
    "lose_an_attempt": 1,
    "lose_a_placement": 1,
    "meet": 1,
    "lose_an_attach": 1,
    "lose_an_answer": 1,
    "freeze_redis": 1,
    "restart_redis_again": 1,
}
"""How often each kind is drawn."""


@dataclass(slots=True)
class Fleet:
    """All processes of a schedule."""

    world: World
    redis: RedisModel
    network: Network
    gateways: list[Gateway]
    leaders: list[Leader]
    workers: list[Worker]
    clients: list[Client]


@dataclass(slots=True)
class Plan:
    """The faults of one schedule; `over_at` is when the last has passed."""

    fleet: Fleet
    rng: Random
    world_process: Process
    over_at: float = 0.0
    kinds: frozenset[str] = frozenset()
    """Which kinds; empty: nothing goes wrong."""

    def draw(self, only: Sequence[str] = ()) -> None:
        """Choose and schedule the faults; `only` of these kinds, if any are named."""
        rng = self.rng
        num_faults = rng.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4))
        names, weights = list(KINDS), list(KINDS.values())
        if only:
            names, weights, num_faults = list(only), [1] * len(only), max(1, num_faults)
        kinds = rng.choices(names, weights, k=num_faults)
        self.kinds = frozenset(kinds)
        for kind in kinds:
            getattr(self, f"_{kind}")(rng.uniform(*FAULTS_MS))

    def _at(self, at_ms: float, act: Callable[[], None]) -> None:
        self._in(at_ms - self.fleet.world.now, act)

    def _in(self, delay_ms: float, act: Callable[[], None]) -> None:
        world = self.fleet.world
        self.over_at = self.fleet.redis.checks.quiet_from = max(self.over_at, world.now + delay_ms)
        world.after(delay_ms, self.world_process, act)

    def _crash(self, process: Process, at_ms: float, back_after_ms: float) -> None:
        def crash() -> None:
            if process.up:
                process.crash()
                self.fleet.network.crashed(process)

        def back() -> None:
            if not process.up:
                self.fleet.world.log(process.name, "starts again")
                process.start()

        self._at(at_ms, crash)
        self._at(at_ms + back_after_ms, back)

    def _freeze(self, process: Process, at_ms: float, for_ms: float) -> None:
        self._at(at_ms, process.freeze)
        self._at(at_ms + for_ms, process.thaw)

    def _crash_worker(self, at_ms: float) -> None:
        self._crash(self.rng.choice(self.fleet.workers), at_ms, self.rng.uniform(50, 3000))

    def _crash_gateway(self, at_ms: float) -> None:
        self._crash(self.rng.choice(self.fleet.gateways), at_ms, self.rng.uniform(20, 3500))

    def _crash_leader(self, at_ms: float) -> None:
        self._crash(self.rng.choice(self.fleet.leaders), at_ms, self.rng.uniform(20, 2000))

    def _kill_engine(self, at_ms: float) -> None:
        worker = self.rng.choice(self.fleet.workers)
        self._at(at_ms, lambda: worker.engine.die() if worker.up and not worker.frozen else None)

    def _stall_engine(self, at_ms: float) -> None:
        worker = self.rng.choice(self.fleet.workers)
        for_ms = self.rng.uniform(200, 4000)

        def stall() -> None:
            worker.engine.stalled_until = at_ms + for_ms

        self._at(at_ms, stall)
        self._at(at_ms + for_ms, lambda: None)

    def _freeze_worker(self, at_ms: float) -> None:
        self._freeze(self.rng.choice(self.fleet.workers), at_ms, self.rng.uniform(100, 5000))

    def _freeze_gateway(self, at_ms: float) -> None:
        self._freeze(self.rng.choice(self.fleet.gateways), at_ms, self.rng.uniform(100, 5000))

    def _freeze_leader(self, at_ms: float) -> None:
        self._freeze(self.rng.choice(self.fleet.leaders), at_ms, self.rng.uniform(100, 4000))

    def _partition(self, at_ms: float) -> None:
        worker, gateway = self.rng.choice(self.fleet.workers).name, self.rng.choice(self.fleet.gateways).name
        self._at(at_ms, lambda: self.fleet.network.partition(worker, gateway))
        self._at(at_ms + self.rng.uniform(30, 3000), lambda: self.fleet.network.heal(worker, gateway))

    def _slow_link(self, at_ms: float) -> None:
        pair = (self.rng.choice(self.fleet.workers).name, self.rng.choice(self.fleet.gateways).name)
        extra_ms = self.rng.choice((20.0, 150.0, 800.0))

        def slow() -> None:
            self.fleet.network.slow[pair] = extra_ms

        def fast() -> None:
            self.fleet.network.slow.pop(pair, None)

        self._at(at_ms, slow)
        self._at(at_ms + self.rng.uniform(100, 2500), fast)

    def _overtake(self, at_ms: float) -> None:
        """A slow stream breaks, and what is still under way on it arrives behind messages of the next one."""
        worker, gateway = self.rng.choice(self.fleet.workers).name, self.rng.choice(self.fleet.gateways).name
        network, slow_ms = self.fleet.network, self.rng.uniform(50, 600)

        def slow() -> None:
            network.slow[worker, gateway] = slow_ms

        def flap() -> None:
            network.slow.pop((worker, gateway), None)
            network.partition(worker, gateway, notice_ms=1.0)
            network.heal(worker, gateway)

        self._at(at_ms, slow)
        self._at(at_ms + self.rng.uniform(50, 700), flap)

    def _redis_trouble(self, at_ms: float) -> None:
        redis, share = self.fleet.redis, self.rng.choice((0.1, 0.3, 0.6))

        def trouble(share: float) -> None:
            redis.trouble = share

        self._at(at_ms, lambda: trouble(share))
        self._at(at_ms + self.rng.uniform(100, 2500), lambda: trouble(0.0))

    def _cut_from_redis(self, at_ms: float) -> None:
        fleet = self.fleet
        processes: list[Process] = [*fleet.workers, *fleet.gateways, *fleet.leaders]
        process, for_ms = self.rng.choice(processes), self.rng.uniform(100, 4000)

        def cut() -> None:
            fleet.redis.cut[process.name] = at_ms + for_ms

        self._at(at_ms, cut)
        self._at(at_ms + for_ms, lambda: None)

    def _zombie(self, at_ms: float) -> None:
        """A worker that is declared lost goes on, and still reaches its gateways."""
        worker, for_ms = self.rng.choice(self.fleet.workers), self.rng.uniform(1300, 3500)

        def cut() -> None:
            self.fleet.redis.cut[worker.name] = at_ms + for_ms

        self._at(at_ms, cut)
        self._at(at_ms + for_ms, lambda: None)

    def _restart_redis(self, at_ms: float) -> None:
        lost_ms = self.rng.choice((0.0, self.rng.uniform(0, 300), self.rng.uniform(0, 1000)))
        if lost_ms:
            self._at(max(0.0, at_ms - lost_ms), self.fleet.redis.snapshot)
        self._at(at_ms, lambda: self.fleet.redis.restart(self.rng.uniform(5, 600)))

    def _restart_redis_unheard(self, at_ms: float) -> None:
        """A process does not hear of the restart before recovery is over: what it holds is not posted."""
        self._restart_redis(at_ms)
        holders: list[Process] = [*self.fleet.workers, *self.fleet.gateways, *self.fleet.leaders]
        self._freeze(self.rng.choice(holders), max(0.0, at_ms - self.rng.uniform(0, 700)), self.rng.uniform(1500, 5000))

    def _restart_redis_again(self, at_ms: float) -> None:
        """Redis dies a second time, perhaps in the middle of the recovery from the first."""
        self._restart_redis(at_ms)
        self._restart_redis(at_ms + self.rng.uniform(100, 2500))

    def _freeze_redis(self, at_ms: float) -> None:
        """A slow disk: whatever was asked runs late, and some who asked have given up."""
        self._freeze(self.fleet.redis, at_ms, self.rng.choice((self.rng.uniform(50, 900), self.rng.uniform(50, 4000))))

    def _lose_an_attempt(self, at_ms: float) -> None:
        """Redis loses that a request was requeued; only the worker of its new attempt knows, and sleeps through the
        recovery.
        """
        fleet = self.fleet
        restart_after_ms, down_ms = self.rng.uniform(20, 900), self.rng.uniform(5, 400)
        awake_ms, asleep_ms = self.rng.uniform(1, 60), self.rng.uniform(1500, 4000)

        def kill() -> None:
            unlucky = max(fleet.workers, key=lambda worker: len(worker.jobs))
            if unlucky.up and not unlucky.frozen:
                fleet.redis.lose_from(moves.Requeue, lambda _: fleet.redis.tell_of(moves.Place, placed))
                unlucky.engine.die()

        def placed(move: moves.Place) -> None:
            worker = next(worker for worker in fleet.workers if move.worker.startswith(f"{worker.name}."))
            gateway = fleet_address(fleet.redis.data.records[move.key].gateway)
            fleet.network.partition(worker.name, gateway)
            self._in(asleep_ms, lambda: fleet.network.heal(worker.name, gateway))
            self._in(awake_ms, worker.freeze)
            self._in(awake_ms + asleep_ms, worker.thaw)
            self._in(restart_after_ms, lambda: fleet.redis.restart(down_ms))

        self._at(at_ms, kill)

    def _lose_a_placement(self, at_ms: float) -> None:
        """Redis loses that a request was placed: its worker runs what the intake still offers."""
        redis = self.fleet.redis
        restart_after_ms, down_ms = self.rng.uniform(10, 900), self.rng.uniform(5, 300)

        def placed(_: moves.Place) -> None:
            self._in(restart_after_ms, lambda: redis.restart(down_ms))

        # Most requests come early.
        self._at(at_ms / 2, lambda: redis.lose_from(moves.Place, placed))

    def _lose_an_attach(self, at_ms: float) -> None:
        """Clients attach anew; Redis loses that; and some attach once more, under reader numbers that were used."""
        rng, fleet = self.rng, self.fleet
        self._at(at_ms, fleet.redis.snapshot)
        self._at(at_ms + 5, lambda: self._hop(1.0))
        self._at(at_ms + rng.uniform(20, 500), lambda: fleet.redis.restart(rng.uniform(5, 200)))
        self._at(at_ms + rng.uniform(600, 2500), lambda: self._hop(0.5))

    def _lose_an_answer(self, at_ms: float) -> None:
        """A script runs, its answer is lost, then Redis loses that it ran; whoever sent it sends it again."""
        redis, rng = self.fleet.redis, self.rng

        def begin() -> None:
            redis.snapshot()
            redis.trouble = 0.6

        def end() -> None:
            redis.trouble = 0.0

        self._at(at_ms, begin)
        self._at(at_ms + rng.uniform(30, 400), lambda: redis.restart(rng.uniform(5, 100)))
        self._at(at_ms + rng.uniform(400, 900), end)

    def _hop(self, share: float) -> None:
        for client in list(self.fleet.clients):
            if self.rng.random() < share:
                client.hop()

    def _meet(self, at_ms: float) -> None:
        """A worker dies; while the next attempt waits for its reader, a copy of a client that holds nothing and the
        client itself attach at one gateway, one behind the other.
        """
        rng, fleet = self.rng, self.fleet

        def kill() -> None:
            busiest = max(fleet.workers, key=lambda worker: len(worker.jobs))

            def back() -> None:
                if not busiest.up:
                    busiest.start()

            if busiest.up:
                fleet.redis.tell_of(moves.Requeue, lambda _: self._in(rng.uniform(1, 400), meet))
                busiest.crash()
                fleet.network.crashed(busiest)
                self._in(rng.uniform(50, 1000), back)

        def meet() -> None:
            gateway = rng.choice(fleet.gateways)
            for client in [client for client in fleet.clients if client.is_reading]:
                habits = Habits(cancel_after_ms=1000.0 if client.spec.max_tokens == ENDLESS else 0.0)
                copy = Client(
                    fleet.world, f"{client.name}'", client.checks, fleet.gateways, client.key, client.spec, habits
                )
                fleet.clients.append(copy)
                client.checks.twins.add(client.key)
                client.expected_ends |= {"superseded", "cancelled"}
                copy.expected_ends |= client.expected_ends
                copy.read_along(gateway)
                fleet.world.after(rng.uniform(1, 100), client, client.move_to, gateway)

        def placed(_: moves.Place) -> None:
            self._in(rng.uniform(150, 500), kill)

        # Journals lag behind a slow network, so that clients hold more; and answers to the first are still under way
        # when the second comes.
        timing = replace(fleet.network.timing, link=80.0, step=15.0, flush=400.0, resume_grace=700.0)
        fleet.network.timing = timing
        for worker in fleet.workers:
            worker.timing = timing
        self._at(at_ms / 2, lambda: fleet.redis.tell_of(moves.Place, placed))
