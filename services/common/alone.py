"""Work that has a task of its own."""

import asyncio
from collections.abc import Coroutine


async def alone(work: Coroutine[object, object, None]) -> None:
    """Run it in its own task: a TaskGroup that is cancelled just as a part of it fails forgets that it was."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    task.result()
