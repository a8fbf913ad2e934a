"""The files of a fleet: logs, the embedded Redis' data, and what is known of its processes.

.shoal/
  fleet.json     the supervisor's process id and the fleet's processes, as they are now
  fleet.lock     held by the supervisor as long as it lives
  log/           one file a process
  redis/         the embedded Redis' data
  tls/           certificates of `shoal up --tls`, new at each start
  dummy/         models of `shoal up --dummy`: a shape, and a tokenizer that is made up
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.fleet.errors import FleetError

VARIABLE = "SHOAL_STATE_DIR"
LOCK_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class StateDir:
    """A fleet's directory. One fleet runs in it at a time."""

    path: Path

    @property
    def logs(self) -> Path:
        """Where each process has its log file."""
        return self.path / "log"

    @property
    def redis_data(self) -> Path:
        """Where the embedded Redis keeps its data, unless told otherwise."""
        return self.path / "redis"

    @property
    def certificates(self) -> Path:
        """Where the certificates of `shoal up --tls` are."""
        return self.path / "tls"

    @property
    def dummy_models(self) -> Path:
        """Where models of `shoal up --dummy` are."""
        return self.path / "dummy"

    def make(self) -> None:
        """Make the directory and that of logs, unless they are there. Raises FleetError if that cannot be."""
        make_folder(self.logs, f"name another directory by {VARIABLE}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be this directory's fleet; its lock goes with it, however it ends.

        Raises FleetError if another is, or the directory cannot be made.
        """
        self.make()
        with self._lock_file.open("w") as file:
            # Whoever looks whether the lock is held has it for a moment: so more than one try.
            deadline = time.monotonic() + LOCK_WAIT_S
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise FleetError(
                        f"a fleet runs in {self.path} already: `shoal status` shows it, `shoal down` ends it, "
                        f"{VARIABLE} names another directory for a second one"
                    )
                time.sleep(0.05)
            try:
                yield
            finally:
                self._fleet_file.unlink(missing_ok=True)

    def is_locked(self) -> bool:
        """Whether a fleet's supervisor lives."""
        try:
            with self._lock_file.open() as file:
                return not _try_lock(file.fileno())
        except FileNotFoundError:
            return False

    def write(self, fleet: Mapping[str, Any]) -> None:
        """Replace what is known of the fleet; readers see the old or the new, never half."""
        fresh = self._fleet_file.with_suffix(".new")
        fresh.write_text(json.dumps(fleet) + "\n")
        fresh.replace(self._fleet_file)

    def read(self) -> dict[str, Any] | None:
        """What is known of the fleet; None before it has said anything."""
        try:
            return dict(json.loads(self._fleet_file.read_text()))
        except FileNotFoundError:
            return None

    @property
    def _fleet_file(self) -> Path:
        return self.path / "fleet.json"

    @property
    def _lock_file(self) -> Path:
        return self.path / "fleet.lock"


def make_folder(folder: Path, advice: str) -> None:
    """Make it, and those above it, unless it is there. Raises FleetError with the advice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetError(f"the folder {folder} can't be made: {error.strerror}; {advice}") from error


def find_state_dir(environ: Mapping[str, str] = os.environ) -> StateDir:
    """The directory that SHOAL_STATE_DIR names, else `.shoal` in the current one."""
    return StateDir(Path(environ.get(VARIABLE) or ".shoal").resolve())


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
