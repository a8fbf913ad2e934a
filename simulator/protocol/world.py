"""Virtual time: one event queue, processes that crash and freeze, and tasks that wait."""

import heapq
from collections import Counter
from collections.abc import Callable, Generator
from random import Random
from typing import Any

Task = Generator[Any, Any, Any]
"""Yields a number (sleep so many ms) or a command of Redis (its answer is sent back)."""


class World:
    """The event queue. Events of one instant run in the order in which they were scheduled."""

    def __init__(self, rng: Random, trace: Callable[[str], None] | None = None) -> None:
        self.rng = rng
        self.now = 0.0
        """Virtual time, ms."""
        self.stopped = False
        self.stats: Counter[str] = Counter()
        """How often each path was taken: a schedule that reaches nothing proves nothing."""
        self._trace = trace
        self._events: list[tuple[float, int, Process, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_ms: float, owner: "Process", act: Callable[..., None], *args: Any) -> None:
        """Let `owner` run `act` in `delay_ms`, unless it has crashed by then."""
        self._count += 1
        heapq.heappush(self._events, (self.now + delay_ms, self._count, owner, owner.life, act, args))

    def run(self, until_ms: float) -> None:
        """Run until `stopped`, or until `until_ms`."""
        events = self._events
        while events and not self.stopped:
            at, _, owner, life, act, args = heapq.heappop(events)
            if at > until_ms:
                return
            if life != owner.life:
                continue
            self.now = at
            if owner.frozen:
                owner.backlog.append((act, args))
            else:
                act(*args)

    def between(self, low: float, high: float) -> float:
        """A random number."""
        return low + (high - low) * self.rng.random()

    def log(self, who: str, what: Callable[[], str] | str) -> None:
        """Write a line of the trace, if one is kept."""
        if self._trace is not None:
            self._trace(f"{self.now:9.1f} {who:<8} {what if isinstance(what, str) else what()}")

    @property
    def traced(self) -> bool:
        """Whether a trace is kept."""
        return self._trace is not None


class Process:
    """What can crash and freeze. A crash forgets all its tasks and messages; a freeze lets them queue up."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        """Grows by each crash."""
        self.up = False
        self.frozen = False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.serve: Callable[[Process, Any, Task], None] = _nobody
        """Sends a command to Redis."""

    def start(self) -> None:
        """Boot with empty memory."""
        self.up = True
        self.boot()

    def boot(self) -> None:
        """What it does first."""

    def crash(self) -> None:
        """SIGKILL."""
        self.life += 1
        self.up = self.frozen = False
        self.backlog.clear()
        self.world.log(self.name, "crashes")

    def freeze(self) -> None:
        """SIGSTOP: sockets stay open, messages and timers wait."""
        self.frozen = self.up
        self.world.log(self.name, "freezes")

    def thaw(self) -> None:
        """SIGCONT: all that waited happens now, in order."""
        if not self.frozen:
            return
        self.frozen = False
        self.world.log(self.name, "thaws")
        backlog, self.backlog = self.backlog, []
        for act, args in backlog:
            self.world.after(0.0, self, act, *args)

    def spawn(self, task: Task) -> None:
        """Run a task until it ends or the process crashes."""
        self.resume(task, None)

    def resume(self, task: Task, value: Any) -> None:
        """Give a task what it waited for."""
        try:
            wait = task.send(value)
        except StopIteration:
            return
        if type(wait) is float or type(wait) is int:
            self.world.after(wait, self, self.resume, task, None)
        else:
            self.serve(self, wait, task)

    def answer(self, delay_ms: float, life: int, task: Task, value: Any) -> None:
        """Resume a task that was started in `life`, unless the process has crashed since."""
        if life == self.life:
            self.world.after(delay_ms, self, self.resume, task, value)


def _nobody(process: Process, command: Any, task: Task) -> None:
    raise AssertionError(f"{process.name} has no Redis")
