"""A process that is kept running: started again when it dies, given up when it never gets ready, ended with all it
started."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from shoal.fleet.errors import FleetError
from shoal.fleet.kept import KeptProcess
from shoal.fleet.kind import Kind
from shoal.fleet.plan import ProcessPlan

READY = """
import json, os, subprocess, sys, time
def say(**what): print(json.dumps({"kind": "worker", **what}), flush=True)
say(loading="weights", fraction=0.5)
print("not for us", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
say(address="here", pid=os.getpid(), engine_pid=child.pid)
"""
STAYS = READY + "time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + STAYS


class Watched:
    """A kept process and what it has told."""

    def __init__(self, program: str, folder: Path) -> None:
        self.changes = 0
        self.loading: list[tuple[str, str, float]] = []
        plan = ProcessPlan(Kind.WORKER, "worker-0", (sys.executable, "-c", program), "here", folder / "log")
        self.process = KeptProcess(plan, self._change, lambda *what: self.loading.append(what))

    def _change(self) -> None:
        self.changes += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(program: str, folder: Path) -> AsyncIterator[Watched]:
    watched = Watched(program, folder)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(watched.process.run())
        try:
            yield watched
        finally:
            task.cancel()


async def test_it_is_started_again_with_its_engine(tmp_path: Path) -> None:
    async with running(STAYS, tmp_path) as watched:
        await watched.until(lambda: watched.process.pid is not None)
        first, engine = watched.process.pid, watched.process.engine_pid
        assert first is not None
        assert engine is not None
        os.kill(first, signal.SIGKILL)
        await watched.until(lambda: watched.process.pid not in (None, first))
        assert not psutil.pid_exists(engine) or psutil.Process(engine).status() == psutil.STATUS_ZOMBIE
        assert watched.process.engine_pid != engine
        assert watched.loading == [("worker-0", "weights", 0.5)] * 2
        assert watched.changes == 3
        assert (tmp_path / "log").read_text() == "not for us\n" * 2


async def test_each_start_in_a_row_waits_longer(tmp_path: Path) -> None:
    async with running(READY, tmp_path) as watched:
        began = time.monotonic()
        await watched.until(lambda: watched.changes >= 8)
        assert time.monotonic() - began > 0.1 + 0.2 + 0.4


async def test_what_never_gets_ready_is_given_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with running("import sys; sys.exit('no such model')", tmp_path):
            await asyncio.sleep(30)
    (error,) = caught.value.exceptions
    assert isinstance(error, FleetError)
    assert "worker-0 ended with status 1" in str(error)
    assert "no such model" in str(error)


async def test_what_says_that_no_retry_helps_is_given_up_at_once_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("worker: of an earlier fleet\n")
    program = (
        "import sys; print('{}', 'worker: no GPU here', 'worker: no model', sep=chr(10), file=sys.stderr); sys.exit(78)"
    )
    with pytest.raises(ExceptionGroup) as caught:
        async with running(program, tmp_path):
            await asyncio.sleep(30)
    (error,) = caught.value.exceptions
    assert str(error) == f"worker-0 cannot start: no GPU here; no model (its log: {tmp_path / 'log'})"
    assert (tmp_path / "log").read_text().count("no GPU here") == 1


async def test_what_was_ready_once_is_started_again_whatever_its_end(tmp_path: Path) -> None:
    async with running(READY + "sys.exit(78)", tmp_path) as watched:
        await watched.until(lambda: watched.changes >= 4)


@pytest.mark.parametrize(("program", "grace_s"), [(STAYS, 10.0), (DEAF, 0.3)])
async def test_its_end_is_bounded_and_leaves_nothing(tmp_path: Path, program: str, grace_s: float) -> None:
    async with running(program, tmp_path) as watched:
        await watched.until(lambda: watched.process.pid is not None)
        whole = [psutil.Process(pid) for pid in (watched.process.pid, watched.process.engine_pid)]
        began = time.monotonic()
        await watched.process.stop(grace_s)
        await watched.until(lambda: watched.process.pid is None)
        assert time.monotonic() - began < 5
    _, alive = psutil.wait_procs(whole, timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
