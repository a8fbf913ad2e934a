"""A model of Redis: one script at a time, and a restart that loses its last writes."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from services.common.ids import RequestKey, WorkerId
from services.common.record import moves, transitions
from services.common.record.record import Attempt, Record
from services.common.record.transitions import Answer, Pool, Transition, Verdict
from simulator.protocol import commands as c
from simulator.protocol.checks import Checks, in_flight_of, tenant_of
from simulator.protocol.world import Process, Task, World

WORKER_TTL_MS = 2500
GATEWAY_TTL_MS = 2000
LEADER_TTL_MS = 1500
BACKLOG_LIMIT = 50
BLOCKING = (c.ReadInbox, c.ReadPool)
MOVES = (
    moves.Submit,
    moves.Place,
    moves.Append,
    moves.Finish,
    moves.Requeue,
    moves.Rebase,
    moves.Cancel,
    moves.Attach,
    moves.Leave,
    moves.Sweep,
    moves.Restore,
    moves.Recover,
)
ANSWERED_WITH_RECORD = (moves.Submit, moves.Attach)
UNGUARDED = (moves.Recover, moves.Restore, moves.Leave)
"""Moves that make the recovery itself."""


@dataclass(slots=True)
class Data:
    """All that Redis stores. A snapshot is a copy of it."""

    records: dict[RequestKey, Record] = field(default_factory=dict)
    intake: dict[RequestKey, c.Queued] = field(default_factory=dict)
    inboxes: dict[WorkerId, list[tuple[int, Any]]] = field(default_factory=dict)
    outstanding: dict[WorkerId, dict[RequestKey, Attempt]] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    workers: dict[WorkerId, float] = field(default_factory=dict)
    """Members of the workers' set; when the registration of each expires."""
    closed: set[WorkerId] = field(default_factory=set)
    """Of these, those that nothing is placed on any more."""
    gateways: dict[str, float] = field(default_factory=dict)
    leader: tuple[str, float] = ("", 0.0)
    epoch: int = 0
    generation: int = 1
    posted: dict[int, dict[str, tuple[c.HeldRequest, ...]]] = field(default_factory=dict)
    tokens_back_at_ms: dict[str, int] = field(default_factory=dict)
    """By tenant."""

    def copy(self) -> "Data":
        """A snapshot; records and entries are immutable and shared."""
        return replace(
            self,
            records=dict(self.records),
            intake=dict(self.intake),
            inboxes={worker: list(inbox) for worker, inbox in self.inboxes.items()},
            outstanding={worker: dict(starts) for worker, starts in self.outstanding.items()},
            events=list(self.events),
            workers=dict(self.workers),
            closed=set(self.closed),
            gateways=dict(self.gateways),
            posted={run_id: dict(posts) for run_id, posts in self.posted.items()},
            tokens_back_at_ms=dict(self.tokens_back_at_ms),
        )


@dataclass(slots=True)
class _Call:
    """A command on its way, or blocked."""

    process: Process
    life: int
    task: Task
    command: Any


class RedisModel(Process):
    """Runs commands one by one, each after a delay. `trouble` makes connections die with commands under way."""

    def __init__(self, world: World, checks: Checks) -> None:
        super().__init__(world, "redis")
        self.data = Data()
        self.checks = checks
        self.run_id = 1
        self.trouble = 0.0
        """Share of commands whose connection dies."""
        self.cut: dict[str, float] = {}
        """Until when a process cannot reach Redis."""
        self._calls: dict[int, _Call] = {}
        self._blocked: list[int] = []
        self._num_calls = 0
        self._last_entry_id = 0
        self._snapshot: Data | None = None
        self._loses: type[moves.Move] | None = None
        self._tells: tuple[type[moves.Move], Callable[[Any], None]] | None = None

    # --- the way of a command -------------------------------------------------------------------------------------

    def submit(self, process: Process, command: Any, task: Task) -> None:
        """Take a command of a task; its answer, or Trouble, resumes the task."""
        world = self.world
        if not self.up:
            process.answer(world.between(5, 40), process.life, task, c.LOST)
            return
        self._num_calls += 1
        number = self._num_calls
        self._calls[number] = _Call(process, process.life, task, command)
        delay = world.between(0.2, 1.0)
        cut = self.cut.get(process.name, 0.0) - world.now
        if cut > 0:
            world.after(cut + delay, self, self._arrives, number, command)
            if type(command) not in BLOCKING:
                world.after(world.between(200, 500), self, self._give_up, number)
            return
        if self.trouble and world.rng.random() < self.trouble and type(command) not in BLOCKING:
            world.stats["connections to redis lost"] += 1
            world.after(world.between(5, 200), self, self._give_up, number)
            # It never runs; or it runs, and nobody hears of it, perhaps long after its sender gave up.
            if world.rng.random() < 0.7:
                world.after(delay + world.between(0, 400), self, self._arrives, -number, command)
            return
        if self.frozen and type(command) not in BLOCKING:
            world.after(world.between(200, 500), process, self._give_up, number)
        world.after(delay, self, self._arrives, number, command)

    def _give_up(self, number: int) -> None:
        call = self._calls.pop(number, None)
        if call is not None:
            call.process.answer(0.0, call.life, call.task, c.LOST)

    def _arrives(self, number: int, command: Any) -> None:
        if type(command) in BLOCKING:
            if number in self._calls and not self._read_now(number):
                self._blocked.append(number)
            return
        # A command whose sender has given up (or died) runs all the same.
        answer = self._execute(command)
        call = self._calls.pop(number, None)
        if call is not None:
            call.process.answer(self.world.between(0.2, 1.0), call.life, call.task, answer)

    def _read_now(self, number: int) -> bool:
        call = self._calls[number]
        entries: list[Any]
        if isinstance(call.command, c.ReadInbox):
            inbox = self.data.inboxes.get(call.command.worker, [])
            entries = [entry for entry in inbox if entry[0] > call.command.after]
        else:
            after = call.command.after
            entries = [entry for entry in self.data.intake.values() if entry.entry_id > after]
            entries += [entry for entry in self.data.events if entry[0] > after]
            entries.sort(key=lambda entry: entry[0])
        if not entries:
            return False
        del self._calls[number]
        call.process.answer(self.world.between(0.2, 1.0), call.life, call.task, entries)
        return True

    def _wake(self, kind: type[Any]) -> None:
        """Entries were added: whoever waits for such is answered."""
        if self._blocked:
            self._blocked = [
                number
                for number in self._blocked
                if number in self._calls and not (type(self._calls[number].command) is kind and self._read_now(number))
            ]

    def _new_entry(self) -> int:
        # Stream ids hold the time, so none comes twice, even where a restart lost entries.
        self._last_entry_id += 1
        return self._last_entry_id

    # --- faults ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """What is written from here on is lost by the next restart."""
        self._snapshot = self.data.copy()

    def lose_from(self, kind: type[moves.Move], then: Callable[[Any], None]) -> None:
        """The next move of a kind to succeed is the first that the next restart loses; `then` hears of it."""
        self._loses = kind
        self.tell_of(kind, then)

    def tell_of(self, kind: type[moves.Move], then: Callable[[Any], None]) -> None:
        """`then` hears of the next move of a kind that succeeds."""
        self._tells = kind, then

    def restart(self, down_ms: float) -> None:
        """Die now; be back in `down_ms` with the data of the snapshot."""
        if self._snapshot is not None:
            self.checks.redis_lost_writes()
            self.data, self._snapshot = self._snapshot, None
        calls, self._calls, self._blocked = self._calls, {}, []
        self.crash()
        for call in calls.values():
            call.process.answer(self.world.between(1, 50), call.life, call.task, c.LOST)
        self.run_id += 1
        self.world.after(down_ms, self, self._back)

    def _back(self) -> None:
        self.up = True
        self.world.log(self.name, f"is back as run {self.run_id}")

    # --- commands -------------------------------------------------------------------------------------------------

    def _execute(self, command: Any) -> Any:
        kind = type(command)
        if kind in MOVES:
            if self.recovering and kind not in UNGUARDED:
                return c.RECOVERING
            answer = self.move(command)
            # These two scripts answer with the record as it now stands.
            return (answer, self.data.records.get(command.key)) if kind in ANSWERED_WITH_RECORD else answer
        return _COMMANDS[kind](self, command)

    @property
    def recovering(self) -> int:
        """The run id that needs recovery; 0: none."""
        return 0 if self.data.generation == self.run_id else self.run_id

    @property
    def fence(self) -> str:
        """The current leader's; empty if its lease has expired."""
        fence, until = self.data.leader
        return fence if until > self.world.now else ""

    def pool(self) -> Pool:
        """What moves need to know beside the record."""
        takers = frozenset(self.data.workers) - self.data.closed
        return Pool(int(self.world.now), self.fence, len(self.data.intake), takers)

    def move(self, move: moves.Move) -> Answer:
        """Make a move of the protocol: one script."""
        before = self.data.records.get(move.key)
        pool = replace(self.pool(), tokens_back_at_ms=self.data.tokens_back_at_ms.get(tenant_of(move.key), 0))
        if isinstance(move, moves.Submit):
            pool = replace(pool, tenant_in_flight=in_flight_of(self.data, move.key))
        step = transitions.apply(before, move, pool)
        if type(move) is self._loses and step.answer.verdict == Verdict.OK:
            self._loses = None
            self.snapshot()
        if step.record is not None and step.record is not before:
            self.data.records[move.key] = step.record
        for effect in step.effects:
            self.effect(effect, step)
        if self.world.traced:
            self._trace(before, move, step)
        self.checks.moved(self.data, before, move, step, pool)
        if self._tells is not None and type(move) is self._tells[0] and step.answer.verdict == Verdict.OK:
            then, self._tells = self._tells[1], None
            then(move)
        return step.answer

    def effect(self, effect: transitions.Effect, step: Transition) -> None:
        """What a script does beside the record."""
        data = self.data
        match effect:
            case transitions.EnterIntake(key):
                assert step.record is not None
                data.intake[key] = c.Queued(self._new_entry(), key, step.record.attempt)
                self._wake(c.ReadPool)
            case transitions.LeaveIntake(key):
                data.intake.pop(key, None)
            case transitions.SendStart(key, worker):
                assert step.record is not None
                self._send(worker, self.start_entry(step.record))
                data.outstanding[worker][key] = step.record.attempt
            case transitions.SendCancel(key, worker, attempt):
                self._send(worker, c.CancelAttempt(key, attempt))
            case transitions.SendRedirect(key, worker, attempt, gateway, reader):
                self._send(worker, c.Redirect(key, attempt, gateway, reader))
            case transitions.Release(key, worker):
                if worker in data.inboxes:
                    data.outstanding[worker].pop(key, None)
                    data.inboxes[worker] = [
                        entry
                        for entry in data.inboxes[worker]
                        if not (isinstance(entry[1], c.Start) and entry[1].key == key)
                    ]
                self._event(c.Released(self._new_entry(), key, worker))
            case transitions.Retain():
                pass
            case transitions.TokensBackAt(key, at_ms):
                data.tokens_back_at_ms[tenant_of(key)] = at_ms

    def start_entry(self, record: Record) -> c.Start:
        """A request as its worker is told of it."""
        remaining = max(1, record.deadline_at_ms - int(self.world.now)) if record.deadline_at_ms else 0
        return c.Start(
            record.key,
            record.attempt,
            record.gateway,
            record.reader,
            record.journal,
            remaining,
            record.suspect_until,
        )

    def _send(self, worker: WorkerId, message: Any) -> None:
        if worker in self.data.inboxes:
            self.data.inboxes[worker].append((self._new_entry(), message))
            self._wake(c.ReadInbox)

    def _event(self, event: Any) -> None:
        self.data.events.append(event)
        self._wake(c.ReadPool)

    def _trace(self, before: Record | None, move: moves.Move, step: Transition) -> None:
        was = "-" if before is None else f"{before.state}/{before.attempt.number}"
        record = step.record
        now = "-" if record is None else f"{record.state}/{record.attempt.number} {[len(j) for j in record.journal]}"
        self.world.log(self.name, f"{_short(move)}: {was} -> {now}, {step.answer.verdict} {step.answer.index}")

    def _appends(self, command: c.Appends) -> Any:
        return c.RECOVERING if self.recovering else [self.move(move) for move in command.moves]

    def _sweeps(self, command: c.Sweeps) -> Any:
        return c.RECOVERING if self.recovering else [self.move(move) for move in command.moves]

    def _read(self, command: c.Read) -> Any:
        if self.recovering:
            return c.RECOVERING
        records = self.data.records
        return {key: records[key] for key in command.keys if key in records}

    def _outstanding(self, command: c.Outstanding) -> dict[RequestKey, Attempt]:
        return dict(self.data.outstanding.get(command.worker, {}))

    def _register(self, command: c.Register) -> bool:
        data = self.data
        if command.worker not in data.workers:
            data.inboxes[command.worker], data.outstanding[command.worker] = [], {}
            self._event(c.Registered(self._new_entry(), command.worker))
        data.workers[command.worker] = self.world.now + WORKER_TTL_MS
        return True

    def _report(self, command: c.Report) -> c.Reported:
        data = self.data
        if data.workers.get(command.worker, 0.0) <= self.world.now:
            return c.Reported(False, command.worker in data.workers, self.recovering)
        data.workers[command.worker] = self.world.now + WORKER_TTL_MS
        self._event((self._new_entry(), command))
        return c.Reported(True, True, self.recovering)

    def _close(self, command: c.Close) -> bool:
        self.data.closed.add(command.worker)
        return True

    def _retire(self, command: c.Retire) -> bool:
        data = self.data
        if (command.fence and command.fence != self.fence) or data.outstanding.get(command.worker):
            return False
        data.workers.pop(command.worker, None)
        data.closed.discard(command.worker)
        data.inboxes.pop(command.worker, None)
        data.outstanding.pop(command.worker, None)
        return True

    def _acquire(self, command: c.Acquire) -> c.Lease | None:
        data, now = self.data, self.world.now
        fence, until = data.leader
        if until > now and not fence.endswith(":" + command.holder):
            return None
        if until <= now:
            data.epoch = max(data.epoch, command.known_epoch) + 1
            fence = f"{data.epoch}:{command.holder}"
        data.leader = (fence, now + LEADER_TTL_MS)
        return c.Lease(data.epoch, fence, self.recovering, self.run_id)

    def _rebuild(self, _: c.Rebuild) -> Any:
        if self.recovering:
            return c.RECOVERING
        data = self.data
        queue = tuple(sorted(data.intake.values()))
        held = {worker: tuple(data.outstanding.get(worker, ())) for worker in data.workers}
        return c.View(self._last_entry_id, queue, held)

    def _survey(self, command: c.Survey) -> c.Surveyed:
        data, now = self.data, self.world.now
        unread = []
        for key in command.keys:
            record = data.records.get(key)
            if record is None or record.ended or record.reader_left_at_ms:
                continue
            if data.gateways.get(record.gateway, 0.0) <= now:
                unread.append(moves.Leave(key, record.reader))
        expired = tuple(worker for worker, until in data.workers.items() if until <= now)
        return c.Surveyed(expired, tuple(unread))

    def _beat(self, command: c.Beat) -> c.Beaten:
        was_alive = self.data.gateways.get(command.gateway, 0.0) > self.world.now
        self.data.gateways[command.gateway] = self.world.now + GATEWAY_TTL_MS
        return c.Beaten(was_alive, self.run_id, self.recovering)

    def _post(self, command: c.Post) -> bool:
        self.data.posted.setdefault(command.run_id, {})[command.holder] = command.requests
        return True

    def _posted(self, command: c.Posted) -> dict[str, tuple[c.HeldRequest, ...]]:
        return dict(self.data.posted.get(command.run_id, {}))

    def _forget(self, command: c.Forget) -> bool:
        self.data.posted.pop(command.run_id, None)
        return True

    def _unfinished(self, _: c.Unfinished) -> list[Record]:
        return [record for record in self.data.records.values() if not record.ended]

    def _complete(self, command: c.Complete) -> bool:
        if command.fence != self.fence:
            return False
        self.data.generation = command.run_id
        self.data.posted.pop(command.run_id, None)
        return True


_COMMANDS: dict[type[Any], Callable[[RedisModel, Any], Any]] = {
    c.Appends: RedisModel._appends,
    c.Sweeps: RedisModel._sweeps,
    c.Read: RedisModel._read,
    c.Outstanding: RedisModel._outstanding,
    c.Register: RedisModel._register,
    c.Report: RedisModel._report,
    c.Close: RedisModel._close,
    c.Retire: RedisModel._retire,
    c.Acquire: RedisModel._acquire,
    c.Rebuild: RedisModel._rebuild,
    c.Survey: RedisModel._survey,
    c.Beat: RedisModel._beat,
    c.Post: RedisModel._post,
    c.Posted: RedisModel._posted,
    c.Forget: RedisModel._forget,
    c.Unfinished: RedisModel._unfinished,
    c.Complete: RedisModel._complete,
}


def insist(command: Any, pause_ms: float = 60) -> Generator[Any, Any, Any]:
    """Ask again until Redis answers. What it asks for may then have happened more than once."""
    while True:
        answer = yield command
        if not isinstance(answer, c.Trouble):
            return answer
        yield pause_ms


def insist_anew(make: Callable[[], Any], pause_ms: float = 60) -> Generator[Any, Any, Any]:
    """As `insist`, with a command made for each try.

    A nonce is for one try: Redis may run the first, lose that, and then run the second. Under one nonce, the worker
    that was given the first and the worker that is given the second would have the same attempt.
    """
    while True:
        answer = yield make()
        if not isinstance(answer, c.Trouble):
            return answer
        yield pause_ms


def _short(move: moves.Move) -> str:
    fields = []
    for name in ("key", "attempt", "worker", "start", "tokens", "state", "why", "floor", "reader", "gateway"):
        value = getattr(move, name, None)
        if value is None:
            continue
        if isinstance(value, Attempt):
            value = f"{value.number}.{value.nonce[:4]}"
        fields.append(str(len(value)) if isinstance(value, tuple) else str(value))
    return f"{type(move).__name__}({' '.join(fields)})"
