"""Many prompts from a file: a JSON object a line, some at once, results in the order of the cases."""

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

from services.common.errors import ShoalError
from shoal._async_client import AsyncClient
from shoal._prompt import Options
from shoal.cli.results import error_of, result_of

COPIED = ("name", "id")
"""Fields of a case that its result gets too."""
INPUTS = ("prompt", "messages", "token_ids")
AHEAD = 8
"""So many times `concurrency` cases are begun or done while an earlier one keeps their results from being written."""


async def run_batch(
    client: AsyncClient, cases: Iterable[str], write: Callable[[str], object], concurrency: int, defaults: Options
) -> int:
    """Answer each case; a case's own fields win over `defaults`. Returns how many failed: their results say why."""
    running = asyncio.Semaphore(concurrency)
    in_order: asyncio.Queue[asyncio.Task[dict[str, Any]] | None] = asyncio.Queue(concurrency * AHEAD)

    async def answer_one(line: str) -> dict[str, Any]:
        async with running:
            return await _answer(client, line, defaults)

    async def begin_all() -> None:
        lines = iter(cases)
        # In a thread: the next line of a pipe may be long in coming.
        while (line := await asyncio.to_thread(next, lines, None)) is not None:
            if line.strip():
                await in_order.put(tasks.create_task(answer_one(line)))
        await in_order.put(None)

    num_failed = 0
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(begin_all())
        while (answering := await in_order.get()) is not None:
            result = await answering
            num_failed += "error" in result
            write(json.dumps(result, ensure_ascii=False) + "\n")
    return num_failed


async def _answer(client: AsyncClient, line: str, defaults: Options) -> dict[str, Any]:
    about: dict[str, Any] = {}
    try:
        case = json.loads(line)
        if not isinstance(case, dict):
            raise TypeError(f"a case is a JSON object, not {type(case).__name__}")
        about = {name: case[name] for name in COPIED if name in case}
        given: dict[str, Any] = {**defaults}
        given.update({name: case[name] for name in (*INPUTS, *Options.__optional_keys__) if name in case})
        async with client.generate(**given) as stream:
            await stream.read()
    except (ShoalError, ValueError, TypeError, KeyError) as error:
        return {**about, "error": error_of(error)}
    return {**about, **result_of(stream)}
