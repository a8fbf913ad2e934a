"""A candidate for the lead: places what is queued, takes requests from lost workers, sweeps, recovers Redis."""

from typing import Any

from services.common.ids import RequestKey, WorkerId
from services.common.record import moves
from services.common.record.record import Attempt, Record
from services.common.record.states import ON_WORKER
from services.common.record.transitions import Verdict
from simulator.protocol import commands as c
from simulator.protocol.world import Process, Task, World

TRY_MS = 400
TICK_MS = 250
GAP_MS = 700
"""A tick that comes later than this shows a stall of the observer, not of the observed."""
LOST_AFTER_MS = 1000


class Leader(Process):
    """Leads whenever it holds the lease. All it knows is rebuilt from Redis."""

    def boot(self) -> None:
        """Be a candidate."""
        self.holder = f"{self.name}.{self.life}"
        self.epoch = 0
        self.fence = ""
        self._reign = 0
        self._forget()
        self.spawn(self._candidate())

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.room = 3
        self.window = 900.0
        self._forget()

    def _forget(self) -> None:
        self.queue: dict[RequestKey, Attempt] = {}
        self.held: dict[WorkerId, set[RequestKey]] = {}
        self._steps: dict[WorkerId, int] = {}
        self._progress_at: dict[WorkerId, float] = {}

    def _candidate(self) -> Task:
        while True:
            lease = yield c.Acquire(self.holder, self.epoch)
            if isinstance(lease, c.Lease):
                self.epoch, self.fence, self._run_id = lease.epoch, lease.fence, lease.run_id
                self.world.log(self.name, f"leads as {self.fence}")
                if not lease.recovering or (yield from self._recover(lease.recovering)):
                    yield from self._lead()
                self._reign += 1
            yield self.world.between(TRY_MS * 0.7, TRY_MS)

    # --- a reign --------------------------------------------------------------------------------------------------

    def _lead(self) -> Task:
        reign = self._reign
        after = yield from self._rebuild()
        if isinstance(after, c.Trouble):
            return
        self.spawn(self._tail(reign, after))
        last = self.world.now
        while self._reign == reign:
            yield TICK_MS
            if self.world.now - last > GAP_MS:
                self._restart_timers()
            last = self.world.now
            if not (yield from self._tick()):
                return

    def _rebuild(self) -> Task:
        """Read the queue and the reservations. Returns the last entry id."""
        view = yield c.Rebuild()
        if isinstance(view, c.Trouble):
            return view
        self.queue = {entry.key: entry.attempt for entry in view.queue}
        self.held = {worker: set(keys) for worker, keys in view.held.items()}
        self._restart_timers()
        return view.last_entry_id

    def _tick(self) -> Task:
        """Lease, liveness, deadlines, readers. Returns False where the reign is over."""
        began_at = self.world.now
        lease = yield c.Acquire(self.holder, self.epoch)
        if lease is c.LOST:
            self._restart_timers()
            return True
        if lease is None or lease.fence != self.fence or lease.recovering or lease.run_id != self._run_id:
            return False
        keys = (*self.queue, *(key for held in self.held.values() for key in held))
        surveyed = yield c.Survey(keys)
        if surveyed is c.LOST or self.world.now - began_at > GAP_MS:
            # A stall in the midst of a round is a gap too.
            self._restart_timers()
            return True
        now = self.world.now
        lost = {
            worker
            for worker, held in self.held.items()
            if held and now - self._progress_at.setdefault(worker, now) > LOST_AFTER_MS
        }
        for worker in lost | set(surveyed.expired):
            yield from self._lose(worker)
        for leave in surveyed.unread:
            _ = yield leave
        if keys:
            answers = yield c.Sweeps(tuple(moves.Sweep(key, self.fence) for key in keys))
            if not isinstance(answers, c.Trouble):
                for key, answer in zip(keys, answers, strict=True):
                    if answer.verdict in (Verdict.ENDED, Verdict.UNKNOWN):
                        self.queue.pop(key, None)
        if self._run_id > 1:
            yield from self._restore_late()
        yield from self._place_all()
        return True

    def _restart_timers(self) -> None:
        self._progress_at = dict.fromkeys(self.held, self.world.now)

    def _tail(self, reign: int, after: int) -> Task:
        """Follow intake and events."""
        while self._reign == reign:
            entries = yield c.ReadPool(after)
            if self._reign != reign:
                return
            if entries is c.LOST:
                self._restart_timers()
                yield 60
                continue
            for entry in entries:
                after = entry[0]
                self._heard(entry)
            yield from self._place_all()

    def _heard(self, entry: Any) -> None:
        match entry:
            case c.Queued(_, key, attempt):
                self.queue[key] = attempt
            case c.Released(_, key, worker):
                self.held.get(worker, set()).discard(key)
            case c.Registered(_, worker):
                self.held.setdefault(worker, set())
                self._progress_at[worker] = self.world.now
            case (_, c.Report(worker, steps, in_flight)):
                if worker in self.held and (steps != self._steps.get(worker) or not in_flight):
                    self._progress_at[worker] = self.world.now
                self._steps[worker] = steps

    def _place_all(self) -> Task:
        for key, attempt in list(self.queue.items()):
            worker = min(self.held, key=lambda worker: len(self.held[worker]), default=None)
            if worker is None or len(self.held[worker]) >= self.room:
                return
            if self.queue.get(key) != attempt:
                continue
            del self.queue[key]
            if not self.held[worker]:
                self._progress_at[worker] = self.world.now
            self.held[worker].add(key)
            answer = yield moves.Place(key, self.fence, attempt, worker)
            if isinstance(answer, c.Trouble) or answer.verdict == Verdict.STALE:
                # It may have run; or an earlier try did, after its connection had died. Only Redis knows.
                yield from self._rebuild_in_place()
                return
            if answer.verdict != Verdict.OK:
                self.held.get(worker, set()).discard(key)
            if answer.verdict == Verdict.NO_WORKER:
                self.held.pop(worker, None)
                self.queue.setdefault(key, attempt)

    def _rebuild_in_place(self) -> Task:
        reign = self._reign
        while self._reign == reign:
            yield 100
            if (yield from self._rebuild()) is not c.LOST:
                return

    def _lose(self, worker: WorkerId) -> Task:
        """Take every request from a worker, then remove it."""
        self.world.stats["workers declared lost"] += 1
        self.world.log(self.name, f"declares {worker} lost")
        self.held.pop(worker, None)
        for _ in range(3):
            outstanding = yield c.Outstanding(worker)
            if outstanding is c.LOST:
                break
            for key, attempt in outstanding.items():
                yield moves.Requeue(key, attempt, self._nonce(), why="its worker was lost", fence=self.fence)
            if (yield c.Retire(worker, self.fence)) is True:
                return
        # Half done: it may still run some of them, so it is not forgotten.
        yield from self._rebuild_in_place()

    # --- recovery -------------------------------------------------------------------------------------------------

    def _recover(self, run_id: int) -> Task:
        """Redis lost its last writes: go above everything that anybody has seen. Returns whether it is done."""
        for _ in range(3):
            yield self.window / 3
            lease = yield c.Acquire(self.holder, self.epoch)
            if not isinstance(lease, c.Lease) or lease.fence != self.fence or lease.recovering != run_id:
                return False
        posted = yield c.Posted(run_id)
        records = yield c.Unfinished()
        if posted is c.LOST or records is c.LOST:
            return False
        seen = [held for requests in posted.values() for held in requests]
        for record in records:
            if not _runs_as_recorded(record, seen):
                floor = _highest(record.key, seen) + 1
                if (yield moves.Recover(record.key, self.fence, self._nonce(), floor)) is c.LOST:
                    return False
            # Redis may have lost that this reader left, or that another one came. Who reads attaches again.
            if not _is_read(record, seen) and (yield moves.Leave(record.key, record.reader)) is c.LOST:
                return False
        if not (yield from self._restore(seen)):
            return False
        done = yield c.Complete(run_id, self.fence)
        self._run_id = run_id
        self.world.stats["recoveries"] += done is True
        return done is True

    def _restore(self, seen: list[c.HeldRequest]) -> Task:
        for held in sorted((held for held in seen if held.restore), key=lambda held: -_reader(held)):
            assert held.restore is not None
            floor = max(2, _highest(held.key, seen) + 1)
            restore = moves.Restore(
                key=held.key,
                fence=self.fence,
                digest=held.restore.digest,
                payload=held.restore.payload,
                num_choices=held.restore.num_choices,
                nonce=self._nonce(),
                gateway=held.restore.gateway,
                reader=held.restore.reader,
                resume_ms=held.restore.resume_ms,
                accepted_at_ms=held.restore.accepted_at_ms,
                deadline_at_ms=held.restore.deadline_at_ms,
                journal=held.restore.journal,
                floor=floor,
            )
            if (yield restore) is c.LOST:
                return False
        return True

    def _restore_late(self) -> Task:
        """A gateway that was frozen, or cut off, during the recovery says what it serves."""
        posted = yield c.Posted(self._run_id)
        if posted is c.LOST or not posted:
            return
        self.world.stats["late holdings"] += 1
        if (yield from self._restore([held for requests in posted.values() for held in requests])):
            yield c.Forget(self._run_id)

    def _nonce(self) -> str:
        return f"{self.world.rng.getrandbits(48):012x}"


def _runs_as_recorded(record: Record, seen: list[c.HeldRequest]) -> bool:
    """Whether a worker runs exactly the attempt that the record gives it, and nobody has seen a higher one.

    A QUEUED record never does: where a worker runs its attempt, the placement was among the lost writes, and the
    next one would run beside it.
    """
    return (
        record.state in ON_WORKER
        and any(held.key == record.key and held.runs_here and held.attempt == record.attempt for held in seen)
        and _highest(record.key, seen) <= record.attempt.number
    )


def _is_read(record: Record, seen: list[c.HeldRequest]) -> bool:
    """Whether a gateway serves the reader that the record names."""
    return any(
        held.restore is not None
        and (held.key, held.restore.gateway, held.restore.reader) == (record.key, record.gateway, record.reader)
        for held in seen
    )


def _highest(key: RequestKey, seen: list[c.HeldRequest]) -> int:
    return max((held.attempt.number for held in seen if held.key == key and held.attempt), default=0)


def _reader(held: c.HeldRequest) -> int:
    return held.restore.reader if held.restore else 0
