"""Streams between workers and gateways, calls between clients and gateways: each in order, each may break."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from services.common.ids import RequestKey
from services.common.record.history import Held
from services.common.record.reader import Refused
from services.common.record.record import Attempt
from services.common.record.run import Frame
from simulator.protocol.timing import Timing
from simulator.protocol.world import Process, World

if TYPE_CHECKING:
    from simulator.protocol.gateway import Gateway
    from simulator.protocol.worker import Worker


class Open(NamedTuple):
    """Worker to gateway: may I send?"""

    key: RequestKey
    attempt: Attempt
    reader: int
    number: int
    """Counts the opens of a run."""


class Frames(NamedTuple):
    """Worker to gateway: tokens."""

    key: RequestKey
    attempt: Attempt
    frames: tuple[Frame, ...]


class EndFrame(NamedTuple):
    """Worker to gateway: the end, which is stored already."""

    key: RequestKey
    attempt: Attempt
    state: str
    num_tokens: tuple[int, ...]
    """Of each choice, in all."""


class CloseFrame(NamedTuple):
    """Worker to gateway: this reader is no longer served here."""

    key: RequestKey
    reader: int


class Resume(NamedTuple):
    """Gateway to worker: you may; this is what the client holds."""

    key: RequestKey
    attempt: Attempt
    held: tuple[Held, ...]
    answers: int
    """Number of the last open. An answer to an older one speaks of a reader that no longer counts."""


class Refusal(NamedTuple):
    """Gateway to worker: you may not."""

    key: RequestKey
    attempt: Attempt
    reason: Refused
    highest: int


@dataclass(slots=True)
class Line:
    """One direction of a stream: in order."""

    world: World
    free_at: float = 0.0
    sent: int = 0
    cut_after: int = 1 << 60
    """Messages beyond this number never arrive."""

    def send(self, to: Process, delay_ms: float, act: Callable[..., None], *args: Any) -> None:
        """Deliver after all that was sent before."""
        self.sent += 1
        at = max(self.world.now + delay_ms, self.free_at)
        self.free_at = at
        self.world.after(at - self.world.now, to, self._arrive, self.sent, act, args)

    def cut(self) -> None:
        """Some of what is under way arrives, the rest never does."""
        self.cut_after = self.sent - int(self.world.rng.random() * 6) if self.sent else 0

    def _arrive(self, number: int, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        if number <= self.cut_after:
            act(*args)


@dataclass(slots=True, eq=False)
class Link:
    """A worker's stream to a gateway."""

    network: "Network"
    worker: "Worker"
    gateway: "Gateway"
    worker_life: int
    gateway_life: int
    up: bool = True
    there: Line = field(init=False)
    back: Line = field(init=False)

    def __post_init__(self) -> None:
        self.there, self.back = Line(self.network.world), Line(self.network.world)

    def to_gateway(self, message: Any) -> None:
        """From the worker."""
        if self.up and self.gateway.life == self.gateway_life:
            self.there.send(self.gateway, self.network.delay(self), self.gateway.receive, self, message)

    def to_worker(self, message: Any) -> None:
        """From the gateway."""
        if self.up and self.worker.life == self.worker_life:
            self.back.send(self.worker, self.network.delay(self), self.worker.receive, self, message)


class Network:
    """Every stream between workers and gateways."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.timing = Timing()
        self.links: list[Link] = []
        self.cut: set[tuple[str, str]] = set()
        """Pairs of worker and gateway that cannot reach each other."""
        self.slow: dict[tuple[str, str], float] = {}
        """Extra delay of a pair, ms, at most."""

    def connect(self, worker: "Worker", gateway: "Gateway | None") -> Link | None:
        """A new stream, or None: nobody answers there."""
        if gateway is None or not gateway.up or (worker.name, gateway.name) in self.cut:
            return None
        link = Link(self, worker, gateway, worker.life, gateway.life)
        self.links.append(link)
        return link

    def delay(self, link: Link) -> float:
        """Of the next message."""
        delay = self.world.between(0.3, self.timing.link)
        slow = self.slow.get((link.worker.name, link.gateway.name), 0.0) if self.slow else 0.0
        return delay + slow * self.world.rng.random()

    def partition(self, worker: str, gateway: str, notice_ms: float | None = None) -> None:
        """From now on these two cannot reach each other; the worker notices some time later."""
        self.cut.add((worker, gateway))
        for link in list(self.links):
            if link.worker.name == worker and link.gateway.name == gateway:
                self._break(link, self.world.between(5, 800) if notice_ms is None else notice_ms)

    def heal(self, worker: str, gateway: str) -> None:
        """They can again."""
        self.cut.discard((worker, gateway))

    def crashed(self, process: Process) -> None:
        """Streams of a dead process break."""
        for link in list(self.links):
            if process in (link.worker, link.gateway):
                self._break(link, self.world.between(1, 30))

    def _break(self, link: Link, notice_ms: float) -> None:
        self.links.remove(link)
        link.there.cut()
        link.back.cut_after = -1
        link.up = False
        if link.worker.life == link.worker_life:
            self.world.after(notice_ms, link.worker, link.worker.link_broke, link)


@dataclass(slots=True, eq=False)
class ClientCall:
    """A client's call of a streaming RPC."""

    world: World
    client: Process
    gateway: "Gateway"
    gateway_life: int = 0
    line: Line = field(init=False)
    open: bool = True
    """The gateway may send."""

    def __post_init__(self) -> None:
        self.line = Line(self.world)
        self.gateway_life = self.gateway.life

    def tell(self, act: Callable[..., None], *args: Any) -> None:
        """From gateway to client, in order."""
        if self.open:
            self.line.send(self.client, self.world.between(0.2, 2.0), act, self, *args)
