"""All processes of a fleet: started in order, kept running, told of, stopped in order."""

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from services.common.error_groups import flat
from shoal.fleet.errors import FleetError
from shoal.fleet.kept import KeptProcess
from shoal.fleet.kind import Kind
from shoal.fleet.plan import FleetPlan, ProcessPlan, SparePlan
from shoal.fleet.progress import Progress
from shoal.fleet.state_dir import StateDir

if TYPE_CHECKING:
    from shoal.fleet.spare import SpareWorkers

STOP_ORDER = (Kind.GATEWAY, Kind.SCHEDULER, Kind.WORKER, Kind.TOKENIZER, Kind.REDIS)
"""First who takes work, last who keeps it."""
STOP_GRACE_S = 10.0
"""For all processes of one kind together; what is left is killed."""


class Supervisor:
    """Runs a fleet. Its processes report changes; one loop writes them to the state directory and to `out`."""

    def __init__(self, plan: FleetPlan, state: StateDir, progress: Progress, out: TextIO) -> None:
        self._state = state
        self._progress = progress
        self._out = out
        self._changed = asyncio.Event()
        self._redis = self._kept(plan.redis) if plan.redis else None
        self._services = [self._kept(service) for service in plan.services]
        self._spare = self._spare_workers(plan.spare) if plan.spare else None
        self._known_ready: set[str] = set()
        self._last_line = ""
        # What clients need to know beside the addresses; nothing if they call in plain.
        self._access = {"tls": {"ca": str(plan.tls.ca)}} if plan.tls else {}

    async def run(self, stop: asyncio.Event) -> None:
        """Run the fleet until `stop` is set; then end every process. Raises FleetError if one never gets ready."""
        failures: list[str] = []
        try:
            await self._run(stop)
        except* FleetError as group:
            failures = [str(error) for error in flat(group)]
        if failures:
            raise FleetError("\n".join(failures))

    def kill_all(self) -> None:
        """End everything at once, without order."""
        for process in self._all():
            process.kill()

    async def _run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            keeping: list[asyncio.Task[None]] = []
            scaling: asyncio.Task[NoReturn] | None = None
            try:
                if self._redis:
                    keeping.append(tasks.create_task(self._redis.run()))
                    await self._report(stop, until_ready=[self._redis])
                keeping += [tasks.create_task(service.run()) for service in self._services]
                if self._spare:
                    scaling = tasks.create_task(self._spare.run(tasks))
                await self._report(stop)
            finally:
                if scaling:
                    scaling.cancel()
                await self._stop_all()
                for task in keeping:
                    task.cancel()
                if self._spare:
                    self._spare.cancel()

    async def _report(self, stop: asyncio.Event, until_ready: Sequence[KeptProcess] = ()) -> None:
        """Tell each change, until `stop` is set or these are ready."""
        async with asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(stop.wait())
            while not stop.is_set() and not (until_ready and _are_ready(until_ready)):
                changing = tasks.create_task(self._changed.wait())
                await asyncio.wait((stopping, changing), return_when=asyncio.FIRST_COMPLETED)
                changing.cancel()
                self._changed.clear()
                self._tell()
            stopping.cancel()

    def _tell(self) -> None:
        processes = self._processes()
        all_ready = _are_ready(self._all())
        self._state.write({"pid": os.getpid(), "ready": all_ready, "processes": processes, **self._access})
        self._tell_progress()
        line = json.dumps({"processes": processes, **self._access})
        if all_ready and line != self._last_line:
            self._last_line = line
            # Whoever read the line may have gone; the fleet stays.
            with suppress(BrokenPipeError):
                print(line, file=self._out, flush=True)

    def _tell_progress(self) -> None:
        ready = {process.plan.name for process in self._all() if process.announced is not None}
        for number, name in enumerate(sorted(ready - self._known_ready), 1):
            self._progress.ready(name, len(self._known_ready & ready) + number, len(self._all()))
        for name in sorted((self._known_ready - ready) & {process.plan.name for process in self._all()}):
            self._progress.say(f"shoal: {name} ended and is started again")
        self._known_ready = ready

    def _processes(self) -> list[dict[str, Any]]:
        """Every process as users see it; `pid` is null while it is not ready."""
        listed = []
        for process in sorted(self._all(), key=lambda process: list(Kind).index(process.plan.kind)):
            plan = process.plan
            about = {"kind": str(plan.kind), "address": plan.address, "pid": process.pid, "log": str(plan.log)}
            more = {"http_address": plan.http_address, "metrics_address": plan.metrics_address}
            listed.append({**about, **{name: address for name, address in more.items() if address}})
            if plan.kind is Kind.WORKER:
                for pid in (process.engine_pid, *process.rank_pids):
                    listed.append({**about, "kind": str(Kind.ENGINE), "pid": pid})  # noqa: PERF401
        return listed

    async def _stop_all(self) -> None:
        """Stop kind after kind. A process may be away already."""
        for kind in STOP_ORDER:
            async with asyncio.TaskGroup() as tasks:
                for process in self._all():
                    if process.plan.kind is kind:
                        tasks.create_task(process.stop(STOP_GRACE_S))

    def _kept(self, plan: ProcessPlan) -> KeptProcess:
        return KeptProcess(plan, self._changed.set, self._progress.loading)

    def _spare_workers(self, plan: SparePlan) -> "SpareWorkers":
        # Imported here only: it needs what a service needs, and who only calls a fleet has not installed that.
        from shoal.fleet.spare import SpareWorkers

        return SpareWorkers(plan, self._kept, self._progress.say, self._changed.set)

    def _all(self) -> list[KeptProcess]:
        spare = self._spare.processes if self._spare else []
        return [*([self._redis] if self._redis else []), *self._services, *spare]


def _are_ready(processes: Sequence[KeptProcess]) -> bool:
    return all(process.announced is not None for process in processes)
