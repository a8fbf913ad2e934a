"""A client: generates, reads, hangs up, cancels, attaches again with what it holds."""

from collections.abc import Callable
from dataclasses import dataclass

from services.common.ids import RequestKey
from services.common.record.history import Held
from simulator.protocol.checks import Checks
from simulator.protocol.commands import Spec
from simulator.protocol.gateway import Gateway
from simulator.protocol.links import ClientCall
from simulator.protocol.world import Process, World

RECONNECT_MS = (10, 250)
MAX_TRIES = 40
VANISHES = 0.25
"""Share of hang-ups of which the gateway hears late."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What a client is going to do, whatever happens. Times in ms; tokens of choice 0."""

    own_id: bool = False
    """It chose the request's id, so it may send Generate again."""
    deadline_ms: int = 0
    resume_ms: int = 1500
    hang_up_at_tokens: int = -1
    """-1: it reads on."""
    hops: int = 0
    """How often it comes back after it hung up, to hang up again after as many tokens; the last time it stays."""
    away_ms: float = 0.0
    """How long it stays away."""
    cancel_after_ms: float = 0.0
    """0: never."""


class Client(Process):
    """One reader of one request. `key`'s text must reach it whole, in order, and end once."""

    def __init__(
        self,
        world: World,
        name: str,
        checks: Checks,
        gateways: list[Gateway],
        key: RequestKey,
        spec: Spec,
        habits: Habits,
    ) -> None:
        super().__init__(world, name)
        self.checks = checks
        self.gateways = gateways
        self.key = key
        self.spec = spec
        self.habits = habits
        self.held: list[list[int]] = [[] for _ in range(spec.num_choices)]
        self.chains = [checks.texts.beginning(key, choice) for choice in range(spec.num_choices)]
        self.end = ""
        """What it was told; `gone`: it hung up for ever."""
        self.expected_ends = {"finished"}
        self.accepted = False
        self._call: ClientCall | None = None
        self._tries = 0
        self._hops = habits.hops
        self._hang_up_at = habits.hang_up_at_tokens
        self._was_frozen = False

    @property
    def is_done(self) -> bool:
        """Whether it waits for nothing more."""
        return bool(self.end)

    def boot(self) -> None:
        """Generate, and live by the habits."""
        self._begin(None)

    def read_along(self, gateway: Gateway | None = None) -> None:
        """Attach to a request that another client generated, with what is held by now."""
        self.up = self.accepted = True
        self._begin(gateway)

    def attach_as_twin_of(self, other: "Client") -> None:
        """A second reader of the same request, with a copy of what the first holds by now."""
        self.held = [list(tokens) for tokens in other.held]
        self.chains = list(other.chains)
        other.expected_ends.add("superseded")
        self.expected_ends = set(other.expected_ends)
        self.read_along()

    def _begin(self, gateway: Gateway | None) -> None:
        self._connect(gateway)
        if self.habits.cancel_after_ms:
            self.world.after(self.habits.cancel_after_ms, self, self._cancel)
        self.world.after(700, self, self._keepalive)

    @property
    def is_reading(self) -> bool:
        """Whether its request was accepted, and it has a connection."""
        return self.accepted and not self.end and self._call is not None

    def hop(self) -> None:
        """Lose the connection, and come back."""
        if self.is_reading:
            self._hang_up()
            self._later(self._connect)

    def move_to(self, gateway: Gateway) -> None:
        """Attach at a certain gateway, now."""
        if not self.end:
            self._hang_up()
            self._connect(gateway)

    # --- messages from the gateway --------------------------------------------------------------------------------

    def was_accepted(self, call: ClientCall) -> None:
        """The request is stored."""
        if call is self._call:
            self.accepted = True
            self.checks.accepted.add(self.key)

    def delta(self, call: ClientCall, choice: int, index: int, tokens: tuple[int, ...]) -> None:
        """Further tokens."""
        if call is not self._call:
            return
        if self.end:
            self.checks.fail(f"{self.key}: {self.name} was given tokens after {self.end}")
        self.checks.client_was_given(self, choice, index, tokens)
        self.held[choice].extend(tokens)
        self.chains[choice] = self.checks.texts.extend(self.chains[choice], tokens)
        self._tries = 0
        if 0 <= self._hang_up_at <= len(self.held[0]):
            self._hang_up()
            if self.habits.hops == 0:
                self._ends("gone")
                return
            self._hops -= 1
            self._hang_up_at = len(self.held[0]) + self.habits.hang_up_at_tokens + 1 if self._hops else -1
            self.world.after(self.habits.away_ms, self, self._connect)

    def ended(self, call: ClientCall, end: str) -> None:
        """The stream is over. `unavailable` may be tried again; anything else is final."""
        if call is not self._call:
            return
        if end == "unavailable" and (self.accepted or self.habits.own_id) and self._tries < MAX_TRIES:
            self._call = None
            self._later(self._connect)
            return
        self._ends(end)

    def broken(self, call: ClientCall) -> None:
        """The connection died."""
        if call is not self._call:
            return
        self._call = None
        if not self.accepted and not self.habits.own_id:
            self._ends("unavailable")
        else:
            self._later(self._connect)

    # --- what it does ---------------------------------------------------------------------------------------------

    def _connect(self, gateway: Gateway | None = None) -> None:
        if self.end or self._call is not None:
            return
        self._tries += 1
        gateway = gateway or self.world.rng.choice(self.gateways)
        if not gateway.up:
            if self._tries < MAX_TRIES and (self.accepted or self.habits.own_id or self._tries < 5):
                self._later(self._connect)
            else:
                self._ends("unavailable")
            return
        call = self._call = ClientCall(self.world, self, gateway)
        gateway.calls.append(call)
        delay = self.world.between(0.2, 2.0)
        if self.accepted:
            held = tuple(Held(len(tokens), tuple(tokens)) for tokens in self.held)
            self.world.after(delay, gateway, gateway.attach, call, self.key, held)
        else:
            habits = self.habits
            self.world.after(
                delay, gateway, gateway.generate, call, self.key, self.spec, habits.deadline_ms, habits.resume_ms
            )

    def _hang_up(self) -> None:
        call, self._call = self._call, None
        if call is not None and call.gateway.life == call.gateway_life:
            # A host that vanishes says no goodbye: its gateway finds out later.
            late = self.world.rng.random() < VANISHES
            delay = self.world.between(50, 1500) if late else self.world.between(0.2, 2.0)
            self.world.after(delay, call.gateway, call.gateway.hung_up, call)

    def _cancel(self) -> None:
        """Ask for the end until the stream tells of one."""
        if self.end:
            return
        if self.accepted:
            gateway = self.world.rng.choice(self.gateways)
            if gateway.up:
                self.world.after(self.world.between(0.2, 2.0), gateway, gateway.cancel, self.key)
        self.world.after(1200, self, self._cancel)

    def _keepalive(self) -> None:
        """A gateway that does not answer pings twice is left."""
        if self.end:
            return
        call = self._call
        frozen = call is not None and call.gateway.frozen
        if frozen and self._was_frozen:
            self._hang_up()
            self._was_frozen = False
            if self.accepted or self.habits.own_id:
                self._later(self._connect)
            else:
                self._ends("unavailable")
        else:
            self._was_frozen = frozen
        self.world.after(700, self, self._keepalive)

    def _later(self, act: Callable[[], None]) -> None:
        self.world.after(self.world.between(*RECONNECT_MS), self, act)

    def _ends(self, end: str) -> None:
        self.checks.client_was_told(self, end)
        self.world.log(self.name, f"{self.key} {end} with {[len(tokens) for tokens in self.held]}")
        self.end = end
        self._call = None
