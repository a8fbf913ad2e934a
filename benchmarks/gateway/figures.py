"""What is asked of the fleet's own speed, and how each figure is measured."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass

import uvloop

from benchmarks.gateway.fleet import Fleet, paced_fleet
from benchmarks.gateway.streams import PROMPT, open_idle, stream_all
from shoal.bench.answer import Answer
from shoal.bench.ask import Ask
from shoal.bench.load import closed_loop, open_loop
from shoal.bench.shoal_target import ShoalTarget
from shoal.bench.summary import percentile
from shoal.fleet.kind import Kind

OPEN = 256
WORKER_FLAGS = (
    *("--max-sequences", "512", "--max-prefill-tokens-per-step", "8192"),
    # The engine keeps its own time: no prompt is to be cut to a budget.
    *("--step-budget-ms", "10000"),
)
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table."""

    name: str
    value: float
    bound: float
    at_least: bool
    unit: str
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether it is within its bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def paced() -> list[Figure]:
    """One delta a token, at a pace that everyone can keep."""
    with _fleet(step_ms=100) as fleet:
        seen = uvloop.run(stream_all(fleet, OPEN, 100))
    each = f"{seen.tokens / seen.deltas:.2f} tokens a delta"
    return [
        Figure(f"{OPEN} streams, deltas / s of gateway CPU", seen.deltas / seen.gateway_cpu_s, 12_000, True, "", each)
    ]


def behind() -> list[Figure]:
    """The gateway gets a quarter of the time, so that tokens wait for it."""
    with _fleet(step_ms=10) as fleet:
        held_back = _held_back(fleet.pids[Kind.GATEWAY], stopped_s=0.3, running_s=0.1)
        seen = uvloop.run(stream_all(fleet, OPEN, 1_000, held_back))
    note = f"{seen.tokens / seen.deltas:.1f} tokens a delta"
    return [
        Figure(
            f"{OPEN} streams, behind, tokens / s of gateway CPU",
            seen.tokens / seen.gateway_cpu_s,
            60_000,
            True,
            "",
            note,
        )
    ]


def requests() -> list[Figure]:
    """Intake to end, everything on this machine, this client included: by the clock, and by processor time."""
    ask = Ask(max_tokens=8, prompt=PROMPT, ignore_eos=True)
    number = 3_000

    def cpu_ms(fleet: Fleet) -> dict[str, float]:
        return {"client": time.process_time() * 1000, **{kind: fleet.cpu_s(kind) * 1000 for kind in fleet.pids}}

    async def measure(fleet: Fleet) -> tuple[float, dict[str, float]]:
        target = ShoalTarget([fleet.gateway], "", TIMEOUT_S)
        await _answered(target, [ask] * OPEN, OPEN)
        before_ms, began_s = cpu_ms(fleet), time.perf_counter()
        await _answered(target, [ask] * number, OPEN)
        took_s = time.perf_counter() - began_s
        cost_ms = {name: (after_ms - before_ms[name]) / number for name, after_ms in cpu_ms(fleet).items()}
        await target.close()
        return number / took_s, cost_ms

    with _fleet(step_ms=20) as fleet:
        per_s, cost_ms = uvloop.run(measure(fleet))
    each = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(cost_ms.items(), key=lambda item: -item[1]))
    return [
        Figure(f"requests / s, 8 tokens each, {OPEN} open", per_s, 400, True, "", f"{os.cpu_count()} cores"),
        Figure("processor time of such a request", sum(cost_ms.values()), 5, False, "ms", each),
    ]


def added_latency() -> list[Figure]:
    """First token, one request at a time after a random pause, without the engine's step."""
    step_ms = 20.0

    async def measure(fleet: Fleet) -> list[float]:
        target = ShoalTarget([fleet.gateway], "", TIMEOUT_S)
        ask = Ask(max_tokens=1, prompt=PROMPT, ignore_eos=True)
        await _answered(target, [ask] * 20, 1)
        pauses, added_ms = random.Random(0), []
        for _ in range(300):
            await asyncio.sleep(pauses.expovariate(1 / 0.02))
            (answer,) = _checked(await open_loop(target, [ask], time.perf_counter))
            added_ms.append(answer.time_to_first_token_s * 1000 - step_ms)
        await target.close()
        return added_ms

    with _fleet(step_ms=step_ms) as fleet:
        added_ms = uvloop.run(measure(fleet))
    return [
        Figure("added to the first token, idle, p50", percentile(added_ms, 50), 8, False, "ms"),
        Figure("added to the first token, idle, p99", percentile(added_ms, 99), 20, False, "ms"),
    ]


def memory() -> list[Figure]:
    """Streams that wait for a worker."""
    number = 5_000
    flags = ("--max-streams", str(number), "--backlog-limit", str(number))
    with _fleet(step_ms=60_000, gateway_flags=flags) as fleet:
        num_bytes = uvloop.run(open_idle(fleet, number))
    return [Figure(f"gateway's memory, {number} open idle streams", num_bytes / 1e6, 600, False, "MB")]


def _fleet(step_ms: float, gateway_flags: Sequence[str] = ()) -> AbstractContextManager[Fleet]:
    return paced_fleet(step_ms, {Kind.WORKER: WORKER_FLAGS, Kind.GATEWAY: gateway_flags})


async def _answered(target: ShoalTarget, asks: Sequence[Ask], concurrency: int) -> list[Answer]:
    return _checked(await closed_loop(target, asks, concurrency, time.perf_counter))


def _checked(answers: list[Answer]) -> list[Answer]:
    if failed := [answer for answer in answers if answer.error]:
        raise RuntimeError(f"{len(failed)} requests failed; the first: {failed[0].error_text}")
    return answers


@asynccontextmanager
async def _held_back(pid: int, stopped_s: float, running_s: float) -> AsyncIterator[None]:
    """A process that is stopped again and again."""

    async def hold() -> None:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(stopped_s)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(running_s)

    holding = asyncio.create_task(hold())
    try:
        yield
    finally:
        holding.cancel()
        with suppress(asyncio.CancelledError):
            await holding
        os.kill(pid, signal.SIGCONT)


FIGURES: Mapping[str, Callable[[], list[Figure]]] = {
    "paced": paced,
    "behind": behind,
    "requests": requests,
    "latency": added_latency,
    "memory": memory,
}
