"""When streams with new tokens are woken to send them: at once, or, when many have some, once no more come in.

A delta costs several times what its tokens cost to take in, most of it in gRPC. Were each message of a worker to wake
all of its streams at once, a gateway that is behind would write one delta a token for ever, while further messages wait
to be read. So it reads first, as long as there is something to be read: what comes in together goes out together.
"""

import asyncio
from collections.abc import Callable

from services.gateway.streams import Stream

FEW = 16
"""So many streams are woken at once."""
QUIET_S = 0.001
LONGEST_S = 0.04
"""Longest that tokens wait for others."""


class Wakes:
    """Streams that wait to be woken. Changed on the gateway's event loop only. `clock`: the loop's, in s."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: set[Stream] = set()
        self._added = asyncio.Event()

    def add(self, stream: Stream) -> None:
        """It has new tokens."""
        self._waiting.add(stream)
        self._added.set()

    async def run(self) -> None:
        """Wake streams until cancelled."""
        while True:
            await self._added.wait()
            self._added.clear()
            if len(self._waiting) > FEW:
                await self._quiet()
            for stream in self._waiting:
                stream.wake()
            self._waiting.clear()

    async def _quiet(self) -> None:
        """Wait until nothing came for QUIET_S, or LONGEST_S have passed."""
        until_s = self._clock() + LONGEST_S
        while True:
            await asyncio.sleep(QUIET_S)
            if not self._added.is_set() or self._clock() >= until_s:
                return
            self._added.clear()
