"""The fleet of a state directory, seen from outside its supervisor."""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from services.common.tls.files import Tls
from shoal.fleet.errors import FleetError
from shoal.fleet.kind import Kind
from shoal.fleet.state_dir import VARIABLE, StateDir

STOP_LIMIT_S = 75.0
"""A fleet stops within its graces; this is above their sum."""


@dataclass(frozen=True, slots=True)
class RunningFleet:
    """What a living supervisor says of its fleet. `processes` as `shoal up` prints them."""

    supervisor_pid: int
    ready: bool
    processes: list[dict[str, Any]]
    tls_ca: str = ""
    """File with the authority of its certificates; empty: it speaks in plain."""

    @staticmethod
    def of(fleet: Mapping[str, Any]) -> "RunningFleet":
        """As the supervisor wrote it."""
        return RunningFleet(fleet["pid"], fleet["ready"], fleet["processes"], fleet.get("tls", {}).get("ca", ""))

    @property
    def tls(self) -> Tls | None:
        """How clients call it; None: in plain. Raises TlsError."""
        return Tls(ca=self.tls_ca) if self.tls_ca else None

    def line(self) -> dict[str, Any]:
        """What `shoal up` prints."""
        return {"processes": self.processes, **({"tls": {"ca": self.tls_ca}} if self.tls_ca else {})}

    @property
    def gateways(self) -> str:
        """The addresses for a client."""
        return ",".join(process["address"] for process in self.processes if process["kind"] == Kind.GATEWAY)

    @property
    def redis_url(self) -> str:
        """Where the embedded Redis is. Raises FleetError if the fleet uses another one."""
        for process in self.processes:
            if process["kind"] == Kind.REDIS:
                return f"redis://{process['address']}"
        raise FleetError("this fleet uses a Redis of your own: say which by --redis URL")


def find_running(state: StateDir) -> RunningFleet:
    """The fleet that runs in this directory. Raises FleetError if none does."""
    fleet = state.read() if state.is_locked() else None
    if fleet is None:
        raise FleetError(
            f"no fleet runs in {state.path}: start one by `shoal up`, or name another directory by {VARIABLE}"
        )
    return RunningFleet.of(fleet)


def stop_running(state: StateDir) -> None:
    """Stop the fleet and wait until all of it is gone. Raises FleetError if none runs, or it does not end in time."""
    fleet = find_running(state)
    with suppress(ProcessLookupError):
        os.kill(fleet.supervisor_pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_LIMIT_S
    while state.is_locked():
        if time.monotonic() > deadline:
            raise FleetError(f"the fleet in {state.path} has not ended in {STOP_LIMIT_S:.0f} s: see its logs")
        time.sleep(0.05)
