"""Whole fleets: `shoal up` in a directory of its own, as a user starts it, always ended by its own process id."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal

UP_LIMIT_S = 90.0
DOWN_LIMIT_S = 75.0
RESTART_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class ProcessLine:
    """A process, as the JSON line has it."""

    kind: str
    address: str
    pid: int
    log: str
    http_address: str = ""
    metrics_address: str = ""


@dataclass(slots=True)
class Fleet:
    """A running `shoal up`. `lines` grows as it prints."""

    supervisor: subprocess.Popen[str]
    state_dir: Path
    lines: list[list[ProcessLine]] = field(default_factory=list)

    @property
    def processes(self) -> list[ProcessLine]:
        """As in the last line."""
        return self.lines[-1]

    @property
    def gateways(self) -> list[str]:
        return [process.address for process in self.processes if process.kind == "gateway"]

    @property
    def http_gateways(self) -> list[str]:
        return [f"http://{process.http_address}/v1" for process in self.processes if process.kind == "gateway"]

    def of_kind(self, kind: str) -> list[ProcessLine]:
        return [process for process in self.processes if process.kind == kind]

    def client(self) -> shoal.Client:
        return shoal.Client(self.gateways)

    def async_client(self) -> shoal.AsyncClient:
        return shoal.AsyncClient(self.gateways)

    def await_lines(self, num_lines: int, limit_s: float = RESTART_LIMIT_S) -> None:
        """Wait until it has printed so many lines."""
        _await(lambda: len(self.lines) >= num_lines or self.supervisor.poll() is not None, limit_s)
        assert len(self.lines) >= num_lines, f"`shoal up` said so little; its logs:\n{self.logs()}"

    def logs(self, last_lines: int = 15) -> str:
        """The end of each process' log."""
        tails = []
        for path in sorted((self.state_dir / "log").glob("*.log")):
            tails += [f"== {path.name}", *path.read_text(errors="replace").splitlines()[-last_lines:]]
        return "\n".join(tails)

    def descendants(self) -> list[psutil.Process]:
        """Every process that it has started, and theirs."""
        return psutil.Process(self.supervisor.pid).children(recursive=True)

    def command(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `shoal ...` in this fleet's directory."""
        return run_shoal(self.state_dir, *words, **options)

    def stop(self) -> None:
        if self.supervisor.poll() is None:
            self.supervisor.terminate()
            try:
                self.supervisor.wait(DOWN_LIMIT_S)
            except subprocess.TimeoutExpired:
                # Its children die with it.
                self.supervisor.kill()
                self.supervisor.wait()
                raise


def run_shoal(state_dir: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one `shoal` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shoal.cli", *words],
        env=environment(state_dir),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def environment(state_dir: Path) -> dict[str, str]:
    return {**os.environ, "SHOAL_STATE_DIR": str(state_dir)}


def start_fleet(state_dir: Path, *flags: str) -> Fleet:
    """Start `shoal up` and wait for its first line."""
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "shoal.cli", "up", *flags],
        env=environment(state_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    fleet = Fleet(supervisor, state_dir)
    threading.Thread(target=_read_lines, args=(fleet,), daemon=True).start()
    try:
        fleet.await_lines(1, UP_LIMIT_S)
    except BaseException:
        fleet.stop()
        raise
    return fleet


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fleet]]:
    """Starts fleets with given flags; they end with the module."""
    fleets: list[Fleet] = []

    def start_one(*flags: str) -> Fleet:
        fleets.append(start_fleet(tmp_path_factory.mktemp("fleet"), *flags))
        return fleets[-1]

    try:
        yield start_one
    finally:
        for fleet in fleets:
            fleet.stop()


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    """One of each, for the whole module."""
    return start()


@pytest.fixture(scope="session")
def greedy_cases() -> list[dict[str, Any]]:
    """The reference outputs of the default model: tests/reference/smollm2_greedy.jsonl."""
    path = Path(__file__).parent.parent / "reference" / "smollm2_greedy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _read_lines(fleet: Fleet) -> None:
    assert fleet.supervisor.stdout is not None
    with fleet.supervisor.stdout as lines:
        for line in lines:
            fleet.lines.append([ProcessLine(**process) for process in json.loads(line)["processes"]])


def _await(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
