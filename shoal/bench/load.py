"""Who asks when: at given times, whatever the server does (open loop), or a fixed number at once (closed loop)."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from shoal.bench.answer import Answer
from shoal.bench.ask import Ask
from shoal.bench.target import Target, TargetError, TokenCounts

Clock = Callable[[], float]
"""In s, from any origin."""


async def open_loop(target: Target, asks: Sequence[Ask], clock: Clock) -> list[Answer]:
    """Send each request at its `arrival_s`, waiting for no answer; return all answers, in order of the requests."""
    began_s = clock()
    async with asyncio.TaskGroup() as tasks:
        answering = []
        for ask in sorted(asks, key=lambda ask: ask.arrival_s):
            wait_s = began_s + ask.arrival_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            answering.append(tasks.create_task(_ask(target, ask, ask.arrival_s, began_s, clock)))
    return [task.result() for task in answering]


async def closed_loop(target: Target, asks: Iterable[Ask], concurrency: int, clock: Clock) -> list[Answer]:
    """Keep `concurrency` requests open: each arrives when an earlier one ends. Return all answers, in order of arrival.

    A slow server is asked less: latencies of a closed loop say nothing of users who come by themselves.
    """
    began_s = clock()
    waiting = iter(asks)

    async def one_after_another() -> list[Answer]:
        return [await _ask(target, ask, clock() - began_s, began_s, clock) for ask in waiting]

    async with asyncio.TaskGroup() as tasks:
        answering = [tasks.create_task(one_after_another()) for _ in range(concurrency)]
    answers = [answer for task in answering for answer in task.result()]
    return sorted(answers, key=lambda answer: answer.arrival_s)


async def _ask(target: Target, ask: Ask, arrival_s: float, began_s: float, clock: Clock) -> Answer:
    sent_s = clock() - began_s
    message_s: list[float] = []
    counts, error, error_text = TokenCounts(0), "", ""
    try:
        counts = await target.ask(ask, lambda: message_s.append(clock() - began_s))
    except TargetError as failure:
        error, error_text = failure.kind, str(failure)
    return Answer(arrival_s, sent_s, message_s, clock() - began_s, counts, error, error_text)
