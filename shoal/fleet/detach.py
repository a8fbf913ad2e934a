"""A fleet in the background: started, waited for until it is ready, then left alone."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import shoal
from shoal.fleet.errors import FleetError
from shoal.fleet.running import RunningFleet
from shoal.fleet.state_dir import StateDir


def start_detached(arguments: Sequence[str], state: StateDir) -> RunningFleet:
    """Run `shoal up` with these arguments in a session of its own; returns when the fleet is ready.

    What it says on standard error goes to `log/up.log`, and here until then. Raises FleetError if it fails.
    """
    state.make()
    log_path = state.logs / "up.log"
    with log_path.open("wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal.cli", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _import_path()},
        )
    try:
        return _await_ready(supervisor, state, log_path)
    except BaseException:
        # Also for Ctrl-C: half a fleet in the background helps nobody.
        supervisor.terminate()
        supervisor.wait()
        raise


def _await_ready(supervisor: "subprocess.Popen[bytes]", state: StateDir, log_path: Path) -> RunningFleet:
    with log_path.open() as said:
        while True:
            status = supervisor.poll()
            sys.stderr.write(said.read())
            sys.stderr.flush()
            if status is not None:
                raise FleetError(f"the fleet did not start (status {status}); what it said is above")
            fleet = state.read()
            if fleet and fleet["ready"] and fleet["pid"] == supervisor.pid:
                return RunningFleet.of(fleet)
            time.sleep(0.05)


def _import_path() -> str:
    ours = str(Path(str(shoal.__file__)).parent.parent)
    return os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH", ""))))
