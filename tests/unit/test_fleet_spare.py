"""Spare workers come and go by the schedulers' word; without a word, or when one cannot start, nothing else changes."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from gen.keda import externalscaler_pb2 as keda
from gen.keda import externalscaler_pb2_grpc
from shoal.fleet.kept import KeptProcess
from shoal.fleet.kind import Kind
from shoal.fleet.plan import ProcessPlan, SparePlan
from shoal.fleet.spare import SpareWorkers

WORKS = """
import json, os, time
print(json.dumps({"kind": "worker", "address": "here", "pid": os.getpid()}), flush=True)
time.sleep(60)
"""
FAILS = "raise SystemExit('no memory')"
NOBODY = "127.0.0.1:1"


class PretendedScheduler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Wants what a test wants; None: it does not know."""

    def __init__(self) -> None:
        self.wanted: int | None = 0
        self.num_asked = 0

    async def GetMetrics(  # noqa: N802
        self, request: keda.GetMetricsRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> keda.GetMetricsResponse:
        self.num_asked += 1
        if self.wanted is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody leads")
        return keda.GetMetricsResponse(metricValues=[keda.MetricValue(metricName="any", metricValue=self.wanted)])


class Spare:
    """Spare workers above one that always runs, the scheduler that they follow, and what was said."""

    def __init__(self, scheduler: PretendedScheduler, workers: SpareWorkers, said: list[str]) -> None:
        self.scheduler = scheduler
        self.workers = workers
        self.said = said

    @property
    def ready(self) -> dict[str, int]:
        """Process ids by name."""
        return {process.plan.name: process.pid for process in self.workers.processes if process.pid}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def want(self, number: int | None) -> None:
        """Return once this was heard, and what follows from it was begun."""
        self.scheduler.wanted = number
        asked = self.scheduler.num_asked
        await self.until(lambda: self.scheduler.num_asked >= asked + 2)


@asynccontextmanager
async def spare(folder: Path, programs: Sequence[str]) -> AsyncIterator[Spare]:
    scheduler, said = PretendedScheduler(), list[str]()  # type: ignore[abstract]  # it is asked for nothing else
    server = grpc.aio.server()
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    plans = tuple(
        ProcessPlan(Kind.WORKER, f"worker-{number}", (sys.executable, "-c", program), "here", folder / f"{number}.log")
        for number, program in enumerate(programs, 1)
    )

    def keep(plan: ProcessPlan) -> KeptProcess:
        return KeptProcess(plan, lambda: None, lambda *loading: None)

    workers = SpareWorkers(
        SparePlan(plans, 1, (NOBODY, f"127.0.0.1:{port}"), tls=None), keep, said.append, lambda: None
    )
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(workers.run(tasks))
        try:
            yield Spare(scheduler, workers, said)
        finally:
            following.cancel()
            for process in workers.processes:
                process.kill()
            workers.cancel()
            await server.stop(0)


async def test_they_are_what_is_wanted_above_those_that_always_run(tmp_path: Path) -> None:
    async with spare(tmp_path, [WORKS, WORKS]) as parts:
        await parts.want(1)
        assert not parts.workers.processes
        await parts.want(9)
        await parts.until(lambda: list(parts.ready) == ["worker-1", "worker-2"])
        (first, second) = parts.ready.values()
        await parts.want(2)
        await parts.until(lambda: parts.ready == {"worker-1": first})
        assert not _lives(second)
        await parts.want(0)
        await parts.until(lambda: not parts.workers.processes)


async def test_while_no_scheduler_knows_they_stay(tmp_path: Path) -> None:
    async with spare(tmp_path, [WORKS]) as parts:
        parts.scheduler.wanted = 2
        await parts.until(lambda: bool(parts.ready))
        await parts.want(None)
        assert list(parts.ready) == ["worker-1"]


async def test_one_that_dies_is_started_again(tmp_path: Path) -> None:
    async with spare(tmp_path, [WORKS]) as parts:
        parts.scheduler.wanted = 2
        await parts.until(lambda: bool(parts.ready))
        pid = parts.ready["worker-1"]
        os.kill(pid, signal.SIGKILL)
        await parts.until(lambda: parts.ready.get("worker-1", pid) != pid)


async def test_one_that_cannot_start_is_told_of_and_given_a_rest(tmp_path: Path) -> None:
    async with spare(tmp_path, [FAILS]) as parts:
        parts.scheduler.wanted = 2
        await parts.until(lambda: any("no memory" in text for text in parts.said))
        await parts.want(2)
        assert not parts.workers.processes, "the next try is later, and nothing else has ended"


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
