"""Faults on a real fleet under load, and what its clients saw.

Sixteen clients ask the reference cases over and over, greedily, so that every right answer is known. Meanwhile
processes are killed (SIGKILL) or frozen and continued (SIGSTOP, SIGCONT), as the seed says.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import shoal
from tests.fleet.conftest import Fleet

KINDS = ("gateway", "tokenizer", "scheduler", "worker", "engine")
NUM_STREAMS = 16
MAX_CONTEXT_TOKENS = 170
SHORT_CONTEXT_TOKENS = 64
LONGEST_FREEZE_S = 4.0
ACCEPTANCE_PATIENCE = shoal.RetryPolicy(outage_limit_s=60.0)
ANSWER_LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is done to one process."""

    kind: str
    choice: float
    """Which of the kind, as a share of their number."""
    freeze_s: float
    """0: killed."""
    pause_s: float
    """Before it, since the last."""


@dataclass(slots=True)
class Answer:
    """What a client got for one case. `arrivals`: when each delta came, after the time of asking; monotonic seconds."""

    name: str
    request_id: str
    arrivals: list[float]
    context_tokens: int
    right: bool
    error: str = ""


@dataclass(slots=True)
class Report:
    """All that was seen."""

    answers: list[Answer] = field(default_factory=list)
    worker_deaths: list[float] = field(default_factory=list)
    """When a worker or an engine was killed; monotonic seconds."""
    faults: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Every answer that is lost or wrong, with its reason. Repeated or missing indices are errors of the client."""
        return [f"{answer.name} ({answer.request_id}): {answer.error}" for answer in self.answers if not answer.right]

    def pauses_at_worker_deaths_s(self) -> list[float]:
        """Of each stream with a short context that was open at a worker's death: its pause around that moment."""
        pauses = []
        for death in self.worker_deaths:
            for answer in self.answers:
                times = answer.arrivals
                if answer.context_tokens <= SHORT_CONTEXT_TOKENS and times[0] < death < times[-1]:
                    after = next(index for index, at in enumerate(times) if at > death)
                    # A pause may begin before the death's effect is seen, and end two deltas later.
                    pauses.append(max(late - early for early, late in pairwise(times[after - 1 : after + 3])))
        return sorted(pauses)

    def summary(self) -> str:
        """Figures, one a line."""
        pauses = self.pauses_at_worker_deaths_s()
        p50, p99 = (f"{_percentile(pauses, share):.2f} s" if pauses else "none seen" for share in (0.5, 0.99))
        return "\n".join(
            [
                f"faults                                 {len(self.faults)}",
                f"answers                                {len(self.answers)}",
                f"lost, wrong, repeated or missing       {len(self.failed)}",
                f"streams open at a worker's death       {len(pauses)} (contexts of at most {SHORT_CONTEXT_TOKENS})",
                f"their longest pause, p50, p99          {p50}, {p99}",
            ]
        )


def deaths_of_workers(number: int, pause_s: float) -> list[Fault]:
    """Workers and engines killed in turn, so far apart that another worker is well each time."""
    return [Fault(("worker", "engine")[turn % 2], turn // 2 % 2 / 2, 0.0, pause_s) for turn in range(number)]


def faults(seed: int, number: int) -> list[Fault]:
    """The faults of a seed."""
    rng = random.Random(seed)
    return [
        Fault(
            kind=rng.choice(KINDS),
            choice=rng.random(),
            freeze_s=rng.uniform(0.2, LONGEST_FREEZE_S) if rng.random() < 0.4 else 0.0,
            pause_s=rng.uniform(1.0, 4.0),
        )
        for _ in range(number)
    ]


async def run_storm(
    fleet: Fleet, cases: Sequence[dict[str, Any]], storm: Coroutine[None, None, None], seed: int, report: Report
) -> Report:
    """Keep 16 streams busy while the storm lasts; return when every stream has got its last answer."""
    small = [case for case in cases if context_tokens(case) <= MAX_CONTEXT_TOKENS]
    over = asyncio.Event()
    async with shoal.AsyncClient(fleet.gateways, retries=ACCEPTANCE_PATIENCE) as client, asyncio.TaskGroup() as tasks:
        for number in range(NUM_STREAMS):
            tasks.create_task(_ask_on(client, small, random.Random(f"{seed}/{number}"), over, report))
        await storm
        over.set()
    return report


async def inflict(fleet: Fleet, plan: Sequence[Fault], report: Report) -> None:
    """Do these faults, one after the other."""
    for fault in plan:
        await asyncio.sleep(fault.pause_s)
        await _inflict(fleet, fault, report)


async def _ask_on(
    client: shoal.AsyncClient, cases: Sequence[dict[str, Any]], rng: random.Random, over: asyncio.Event, report: Report
) -> None:
    while not over.is_set():
        report.answers.append(await _ask(client, rng.choice(cases)))


async def _ask(client: shoal.AsyncClient, case: dict[str, Any]) -> Answer:
    question = {"messages": case["messages"]} if case["kind"] == "chat" else {"prompt": case["prompt"]}
    stream = client.generate(**question, temperature=0.0, max_tokens=case["max_tokens"])
    answer = Answer(case["name"], "", [time.monotonic()], context_tokens(case), right=False)
    try:
        async with asyncio.timeout(ANSWER_LIMIT_S):
            async for _ in stream:
                answer.arrivals.append(time.monotonic())
    except (shoal.ShoalError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    else:
        answer.right = list(stream.token_ids) == case["output_token_ids"]
        text_right = stream.text.rstrip("\ufffd") == case["text"].rstrip("\ufffd")
        if not (answer.right and text_right):
            answer.right = False
            answer.error = f"got {list(stream.token_ids)} {stream.text!r}"
    answer.request_id = stream.request_id
    return answer


async def _inflict(fleet: Fleet, fault: Fault, report: Report) -> None:
    victims = fleet.of_kind(fault.kind)
    if not victims:
        report.faults.append(f"{fault.kind}: none alive")
        return
    pid = victims[int(fault.choice * len(victims))].pid
    report.faults.append(
        f"{fault.kind} {pid}: " + (f"frozen for {fault.freeze_s:.1f} s" if fault.freeze_s else "killed")
    )
    if fault.kind in ("worker", "engine"):
        report.worker_deaths.append(time.monotonic())
    if not _signal(pid, signal.SIGSTOP if fault.freeze_s else signal.SIGKILL):
        report.faults[-1] += " (was gone already)"
    elif fault.freeze_s:
        await asyncio.sleep(fault.freeze_s)
        _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def context_tokens(case: dict[str, Any]) -> int:
    """Tokens of prompt and answer."""
    return len(case["prompt_token_ids"]) + len(case["output_token_ids"])
