"""Workers beyond the least: started while the scheduler wants them, ended when it no longer does."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import NoReturn

import grpc

from gen.keda import externalscaler_pb2, externalscaler_pb2_grpc
from services.common.rpc import channel
from shoal.fleet.errors import FleetError
from shoal.fleet.kept import KeptProcess
from shoal.fleet.plan import ProcessPlan, SparePlan

ASK_S = 0.5
ANSWER_LIMIT_S = 2.0
REST_S = 30.0
"""No worker is started for so long after one that could not be."""
STOP_GRACE_S = 15.0
"""A worker hands over what it has within 10 s."""


class SpareWorkers:
    """As many workers as are wanted above those that always run. Changed by its own task, and those of its workers."""

    def __init__(
        self, plan: SparePlan, keep: Callable[[ProcessPlan], KeptProcess], say: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`keep`: makes a kept process. `say`: tells a person. `changed`: hears when `processes` is another list."""
        self.processes: list[KeptProcess] = []
        """Those that run or start, in the order in which they were started."""
        self._plan = plan
        self._keep = keep
        self._say = say
        self._changed = changed
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rests_until_s = 0.0

    async def run(self, tasks: asyncio.TaskGroup) -> NoReturn:
        """Follow what the schedulers say, until cancelled. The workers' tasks are `tasks`', and stay."""
        async with contextlib.AsyncExitStack() as channels:
            stubs: list[externalscaler_pb2_grpc.ExternalScalerAsyncStub] = []
            for address in self._plan.schedulers:
                to_scheduler = await channels.enter_async_context(channel(address, self._plan.tls))
                stubs.append(externalscaler_pb2_grpc.ExternalScalerStub(to_scheduler))
            while True:
                wanted = await _wanted(stubs)
                if wanted is not None:
                    await self._scale(min(max(0, wanted - self._plan.always), len(self._plan.workers)), tasks)
                await asyncio.sleep(ASK_S)

    def cancel(self) -> None:
        """Forget the tasks of workers that were stopped."""
        for task in self._tasks.values():
            task.cancel()

    async def _scale(self, num_workers: int, tasks: asyncio.TaskGroup) -> None:
        while len(self.processes) < num_workers and asyncio.get_running_loop().time() >= self._rests_until_s:
            self._start(tasks)
        while len(self.processes) > num_workers:
            await self._end(self.processes[-1])

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        used = {process.plan.name for process in self.processes}
        plan = next(plan for plan in self._plan.workers if plan.name not in used)
        process = self._keep(plan)
        self._say(f"shoal: {plan.name} is started: more workers are wanted")
        self.processes.append(process)
        self._tasks[plan.name] = tasks.create_task(self._run_one(process))
        self._changed()

    async def _end(self, process: KeptProcess) -> None:
        """Its requests go on elsewhere, each at its next token."""
        self._say(f"shoal: {process.plan.name} is ended: fewer workers are wanted")
        await process.stop(STOP_GRACE_S)
        await asyncio.wait({self._tasks[process.plan.name]})  # Its port is free then.

    async def _run_one(self, process: KeptProcess) -> None:
        try:
            await process.run()
        except FleetError as error:
            # The others answer meanwhile: no reason to end them.
            self._say(f"shoal: {error}\nshoal: the next try is in {REST_S:.0f} s")
            self._rests_until_s = asyncio.get_running_loop().time() + REST_S
        finally:
            self.processes.remove(process)
            self._changed()


async def _wanted(stubs: "Sequence[externalscaler_pb2_grpc.ExternalScalerAsyncStub]") -> int | None:
    """Workers wanted in all, by the first scheduler that knows. None: none does now, and nothing shall change."""
    for stub in stubs:
        try:
            answer = await stub.GetMetrics(externalscaler_pb2.GetMetricsRequest(), timeout=ANSWER_LIMIT_S)
        except grpc.aio.AioRpcError:
            continue
        return int(answer.metricValues[0].metricValue)
    return None
