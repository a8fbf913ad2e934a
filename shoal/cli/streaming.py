"""An answer shown as it comes."""

import asyncio
import signal
import sys
import time

from services.common.errors import ShoalError
from shoal._async_client import AsyncStream
from shoal._values import FinishReason


async def show(stream: AsyncStream, *, stats: bool) -> bool:
    """Print an answer's text as it comes; `stats` adds a line on standard error. Returns False if it was cancelled.

    Ctrl-C cancels the answer at the fleet; a second one stops waiting for that. Raises ShoalError.
    """
    began = time.monotonic()
    first_token_s = 0.0
    failure: ShoalError | None = None
    async with asyncio.TaskGroup() as tasks:
        interrupts = _Interrupts(stream, tasks)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupts.interrupt)
        try:
            async for delta in stream:
                first_token_s = first_token_s or time.monotonic() - began
                print(delta.text, end="", flush=True)
        except ShoalError as error:
            failure = error
        finally:
            if first_token_s or failure is None:
                print(flush=True)
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    if failure is not None:
        raise failure
    if stats and stream.finished:
        num_tokens, took_s = len(stream.token_ids), time.monotonic() - began
        rate = (num_tokens - 1) / (took_s - first_token_s) if num_tokens > 1 and took_s > first_token_s else 0.0
        print(
            f"[{num_tokens} tokens, {stream.finished.reason}; first after {first_token_s * 1000:.0f} ms, "
            f"then {rate:.1f} tokens/s; `shoal trace {stream.request_id}`]",
            file=sys.stderr,
        )
    return stream.finished is not None and stream.finished.reason is not FinishReason.CANCELLED


class _Interrupts:
    def __init__(self, stream: AsyncStream, tasks: asyncio.TaskGroup) -> None:
        self._stream = stream
        self._tasks = tasks
        self._asked = False

    def interrupt(self) -> None:
        end = self._stream.close() if self._asked else self._cancel()
        self._asked = True
        self._tasks.create_task(end)

    async def _cancel(self) -> None:
        try:
            await self._stream.cancel()
        except ShoalError:
            # It has ended just now, or the fleet is away: then nothing is to be waited for.
            await self._stream.close()
