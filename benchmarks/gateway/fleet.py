"""One of each service as processes, with an engine that only keeps time."""

import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.gateway.noted import NOTES_VARIABLE, SEAMS
from benchmarks.gateway.paced_engine import STEP_MS_VARIABLE
from services.common.model.location import default_model_path
from shoal.fleet.kind import Kind
from shoal.fleet.options import FleetOptions
from shoal.fleet.plan import FleetPlan, ProcessPlan, plan_fleet
from shoal.fleet.state_dir import StateDir

START_LIMIT_S = 60.0
END_LIMIT_S = 20.0
PACED_WORKER = "benchmarks.gateway.paced_worker"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet."""

    gateway: str
    """host:port, for gRPC."""
    pids: Mapping[Kind, int]

    def cpu_s(self, kind: Kind) -> float:
        """Processor time that a process has taken so far, in user and system mode; a tokenizer's with its pool's."""
        processes = [psutil.Process(self.pids[kind])]
        if kind is Kind.TOKENIZER:
            processes += processes[0].children()
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def memory_bytes(self, kind: Kind) -> int:
        """Resident memory of a process."""
        return int(psutil.Process(self.pids[kind]).memory_info().rss)


@contextmanager
def paced_fleet(step_ms: float, flags: Mapping[Kind, Sequence[str]], notes: Path | None = None) -> Iterator[Fleet]:
    """A fleet whose engine makes a step each `step_ms`; `flags`: further ones, by kind. Raises RuntimeError.

    `notes`: where its services write what they note (`noted`) when they have ended; None: they note nothing.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        state = StateDir(Path(folder))
        state.logs.mkdir()
        plan = plan_fleet(FleetOptions(default_model_path()), state, random.Random())
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), STEP_MS_VARIABLE: str(step_ms)}
        services = [_paced(each) for each in plan.services]
        if notes is not None:
            environment[NOTES_VARIABLE] = str(notes)
            services = [_noted(each) for each in services]
        yield _started(plan, services, environment, flags, processes)


def _started(
    plan: FleetPlan, services: Sequence[ProcessPlan], environment: Mapping[str, str],
    flags: Mapping[Kind, Sequence[str]], processes: ExitStack,
) -> Fleet:  # fmt: skip
    assert plan.redis, "an embedded one"
    redis = processes.enter_context(_process(plan.redis, (), environment))
    _await_port(plan.redis.address)
    pids = {Kind.REDIS: redis.pid}
    running = {
        each.kind: processes.enter_context(_process(each, flags.get(each.kind, ()), environment)) for each in services
    }
    for kind, process in running.items():
        pids[kind] = process.pid
        announced = _announced(kind, process)
        if "engine_pid" in announced:
            pids[Kind.ENGINE] = int(str(announced["engine_pid"]))
    return Fleet(next(each.address for each in plan.services if each.kind is Kind.GATEWAY), pids)


def _paced(plan: ProcessPlan) -> ProcessPlan:
    if plan.kind is not Kind.WORKER:
        return plan
    command = tuple(PACED_WORKER if part == "services.worker" else part for part in plan.command)
    return replace(plan, command=command)


def _noted(plan: ProcessPlan) -> ProcessPlan:
    command = plan.command
    place = next(place for place, part in enumerate(command) if part in SEAMS)
    return replace(plan, command=(*command[:place], "benchmarks.gateway.noted", *command[place:]))


@contextmanager
def _process(
    plan: ProcessPlan, flags: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    with plan.log.open("wb") as log:
        process = subprocess.Popen(
            [*plan.command, *flags], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            text=True, cwd=plan.log.parent,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout
        process.stdout.close()


def _announced(kind: Kind, process: subprocess.Popen[str]) -> dict[str, object]:
    """The line by which a process says that it is ready."""
    assert process.stdout
    for line in process.stdout:
        announced = json.loads(line)
        if "address" in announced:
            return dict(announced)
    raise RuntimeError(f"the {kind} ended with status {process.wait()} before it was ready")


def _await_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    give_up_s = time.monotonic() + START_LIMIT_S
    while True:
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.02)
        else:
            return
