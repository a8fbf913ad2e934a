"""Waits for what other processes do."""

import asyncio
from collections.abc import Callable


async def eventually(condition: Callable[[], bool], within_s: float = 20) -> None:
    """Return once the condition holds. Raises TimeoutError if it does not in time."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)
