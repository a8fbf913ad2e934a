"""One process, kept running: started, listened to, started again when it dies."""

import asyncio
import json
import os
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from services.common.ending import UNFIT_STATUS
from shoal.fleet.command import kill_session, start
from shoal.fleet.errors import FleetError
from shoal.fleet.kind import Kind
from shoal.fleet.plan import ProcessPlan

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
WELL_AFTER_S = 30.0
"""A process that lived so long begins again with the first delay."""
START_TRIES = 3
"""A process that ends so often before it was ready once has a cause that trying again does not remove."""
LOG_LINES_SHOWN = 12
REDIS_POLL_S = 0.02
"""It announces nothing: it is asked."""


class KeptProcess:
    """A process of the fleet. Its own task changes it; others read, and may call `stop`.

    `on_change` is called when it became ready, said something new of itself, or died, and while it loads
    `on_loading(name, what, fraction)`.
    """

    def __init__(
        self, plan: ProcessPlan, on_change: Callable[[], None], on_loading: Callable[[str, str, float], None]
    ) -> None:
        self.plan = plan
        self.announced: dict[str, Any] | None = None
        self._on_change = on_change
        self._on_loading = on_loading
        self._process: Process | None = None
        self._stopping = False
        self._was_ready = False

    @property
    def pid(self) -> int | None:
        """Its process id while it is ready."""
        return self._process.pid if self._process and self.announced is not None else None

    @property
    def rank_pids(self) -> list[int]:
        """Further processes of a worker's engine, if its model is dealt out."""
        return self.announced.get("rank_pids", []) if self.announced else []

    @property
    def engine_pid(self) -> int | None:
        """A worker's engine."""
        return self.announced.get("engine_pid") if self.announced else None

    async def run(self) -> None:
        """Keep it running until `stop`. Raises FleetError if it never gets ready; at once if it says that it cannot."""
        delay_s, num_failures = FIRST_DELAY_S, 0
        while not self._stopping:
            began, log_bytes = time.monotonic(), self._log_bytes()
            status = await self._run_once()
            if self._stopping:
                return
            num_failures += 1
            if not self._was_ready and status == UNFIT_STATUS:
                raise FleetError(self._why_it_is_unfit(log_bytes))
            if not self._was_ready and num_failures == START_TRIES:
                raise FleetError(self._why_it_failed(status))
            if time.monotonic() - began > WELL_AFTER_S:
                delay_s = FIRST_DELAY_S
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)

    async def stop(self, grace_s: float) -> None:
        """Ask it to end, and kill it if it has not after `grace_s`."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            self.kill()

    def kill(self) -> None:
        """End it at once, with all it started."""
        self._stopping = True
        if self._process is not None:
            kill_session(self._process.pid)

    async def _run_once(self) -> int:
        with self.plan.log.open("ab") as log:
            read_end, write_end = os.pipe()
            try:
                self._process = await start(self.plan.command, write_end, log)
            finally:
                os.close(write_end)
            if self._stopping:  # told so while it was being started
                self.kill()
            async with asyncio.TaskGroup() as tasks:
                # Our own pipe: asyncio's would wait for all who inherited it, not for the process alone.
                listeners = [tasks.create_task(self._listen(read_end, log))]
                if self.plan.kind is Kind.REDIS:
                    listeners.append(tasks.create_task(self._await_redis()))
                try:
                    return await self._process.wait()
                finally:
                    for listener in listeners:
                        listener.cancel()
                    kill_session(self._process.pid)
                    await self._process.wait()
                    self._process, self.announced = None, None
                    self._on_change()

    async def _listen(self, read_end: int, log: IO[bytes]) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", buffering=0)
        )
        try:
            async for line in reader:
                if not self._take(line):
                    log.write(line)
                    log.flush()
        finally:
            transport.close()

    def _take(self, line: bytes) -> bool:
        """Understand a line of standard output; False if it is not one of ours."""
        try:
            said = json.loads(line)
        except ValueError:
            return False
        if not isinstance(said, dict) or said.get("kind") != self.plan.kind:
            return False
        if "pid" in said:
            self._ready(said)
        elif "loading" in said:
            self._on_loading(self.plan.name, str(said["loading"]), float(said.get("fraction", 0.0)))
        return True

    async def _await_redis(self) -> None:
        host, _, port = self.plan.address.rpartition(":")
        while not await _answers_ping(host, int(port)):  # noqa: ASYNC110 - another process: no event tells
            await asyncio.sleep(REDIS_POLL_S)
        self._ready({})

    def _ready(self, announced: dict[str, Any]) -> None:
        self.announced = announced
        self._was_ready = True
        self._on_change()

    def _log_bytes(self) -> int:
        return self.plan.log.stat().st_size if self.plan.log.exists() else 0

    def _why_it_is_unfit(self, from_byte: int) -> str:
        """In its own words, which begin with its kind; its log has more."""
        said = self.plan.log.read_bytes()[from_byte:].decode(errors="replace").splitlines()
        begin = f"{self.plan.kind}: "
        reasons = [line.removeprefix(begin) for line in said if line.startswith(begin)]
        return f"{self.plan.name} cannot start: {'; '.join(reasons)} (its log: {self.plan.log})"

    def _why_it_failed(self, status: int) -> str:
        lines = deque(self.plan.log.read_text(errors="replace").splitlines(), maxlen=LOG_LINES_SHOWN)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        tail = "\n".join(f"  {line[:500]}" for line in lines)
        return f"{self.plan.name} ended with {how} {START_TRIES} times before it was ready. {self.plan.log}:\n{tail}"


async def _answers_ping(host: str, port: int) -> bool:
    """Whether Redis is there and has loaded its data: until then it answers with an error."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
