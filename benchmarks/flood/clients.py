"""Processes of clients, which ask at once, or evenly over a time, and hear every answer."""

import itertools
import multiprocessing
import selectors
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import psutil

from benchmarks.flood.connections import RECEIVED_BYTES, Connection, Is

# spawn: gRPC does not survive a fork.
SPAWN = multiprocessing.get_context("spawn")
Connect = Callable[[str], Connection]
"""Opens a connection to an address."""


class Listening(NamedTuple):
    """A server's process."""

    address: str
    pid: int


class Flood(NamedTuple):
    """What all clients saw."""

    refused_ms: list[float]
    num_served: int
    sent_over_s: float
    server_cpu_s: float
    """Processor time of all servers until the last refusal."""
    client_cpu_s: float
    """The clients' until then."""


class Seen(NamedTuple):
    """What one process of clients saw. Times of sending are monotonic."""

    refused_ms: list[float]
    num_served: int
    first_sent_at_s: float
    last_sent_at_s: float
    cpu_s: float


def flood(
    servers: Sequence[Listening], connect: Connect, num_processes: int, num_connections: int, num_requests: int,
    over_s: float,
) -> Flood:  # fmt: skip
    """Ask, and wait for every answer. The connections are open beforehand, and go to each server in turn."""
    addresses = [server.address for server, _ in zip(itertools.cycle(servers), range(num_connections))]
    start = SPAWN.Barrier(num_processes + 1)
    pipes = [SPAWN.Pipe() for _ in range(num_processes)]
    for place, (_, theirs) in enumerate(pipes):
        share = len(range(place, num_requests, num_processes))
        work = (connect, addresses[place::num_processes], share, over_s, start, theirs)
        SPAWN.Process(target=ask_all, args=work, daemon=True).start()
    start.wait()
    before_s = processor_s(servers)
    for ours, _ in pipes:
        ours.recv()
    server_cpu_s = processor_s(servers) - before_s
    seen: list[Seen] = [ours.recv() for ours, _ in pipes]
    return Flood(
        refused_ms=[took_ms for each in seen for took_ms in each.refused_ms],
        num_served=sum(each.num_served for each in seen),
        sent_over_s=max(each.last_sent_at_s for each in seen) - min(each.first_sent_at_s for each in seen),
        server_cpu_s=server_cpu_s,
        client_cpu_s=sum(each.cpu_s for each in seen),
    )


def processor_s(servers: Sequence[Listening]) -> float:
    """Processor time of all of them so far."""
    times = [psutil.Process(server.pid).cpu_times() for server in servers]
    return sum(time.user + time.system for time in times)


def ask_all(
    connect: Connect, addresses: Sequence[str], num_requests: int, over_s: float, start: Barrier, results: Pipe
) -> None:
    """In a process of its own: say when no refusal is missing any more, then what was seen."""
    with selectors.DefaultSelector() as selector:
        clients = _Clients([connect(address) for address in addresses], num_requests, over_s, selector)
        start.wait()
        began_at_s, began_cpu_s = time.monotonic(), time.process_time()
        while clients.num_unanswered:
            clients.ask_and_hear(began_at_s)
        cpu_s = time.process_time() - began_cpu_s
        results.send(None)
        while clients.num_open:
            clients.ask_and_hear(began_at_s)
        results.send(Seen(clients.refused_ms, clients.heard[Is.ENDED], began_at_s, clients.last_sent_at_s, cpu_s))


class _Clients:
    """Those of one process."""

    def __init__(
        self, connections: Sequence[Connection], num_requests: int, over_s: float, selector: selectors.BaseSelector
    ) -> None:
        for each in connections:
            selector.register(each.socket, selectors.EVENT_READ, each)
        self._selector = selector
        self._next = itertools.cycle(connections)
        self._num_requests = num_requests
        self._gap_s = over_s / num_requests
        self._num_asked = 0
        self.last_sent_at_s = 0.0
        self.heard: Counter[Is] = Counter()
        self.refused_ms: list[float] = []

    @property
    def num_unanswered(self) -> int:
        """Requests of which nothing is heard."""
        return self._num_requests - self.heard[Is.REFUSED] - self.heard[Is.ACCEPTED]

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return self._num_requests - self.heard[Is.REFUSED] - self.heard[Is.ENDED]

    def ask_and_hear(self, began_at_s: float) -> None:
        """Send what is due, and wait for an answer, or until more is due."""
        due_in_s = 0.0
        while self._num_asked < self._num_requests:
            due_in_s = began_at_s + self._num_asked * self._gap_s - time.monotonic()
            if due_in_s > 0:
                break
            next(self._next).ask()
            self._num_asked += 1
            self.last_sent_at_s = time.monotonic()
        for key, _ in self._selector.select(due_in_s if due_in_s > 0 else None):
            connection: Connection = key.data
            data = connection.socket.recv(RECEIVED_BYTES)
            now_s = time.monotonic()
            for what, sent_at_s in connection.heard(data):
                self.heard[what] += 1
                if what is Is.REFUSED:
                    self.refused_ms.append((now_s - sent_at_s) * 1000)
