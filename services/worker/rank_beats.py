"""How the processes of a sharded worker see that another one stands still, whatever they themselves wait for.

Each counts as long as it lives. Looks are counted, not time: when the whole machine stood still, no beat is missing.
"""

import struct
import threading
from collections.abc import Callable

BEAT_S = 0.2
LOOKS_WITHOUT_BEAT = 7
LINE_BYTES = 64
_COUNT = struct.Struct("<Q")


class RankBeats:
    """One rank's beats, and its watch over those of the others."""

    def __init__(self, memory: memoryview, rank: int, world_size: int) -> None:
        """`memory`: a line a rank, zeros at first."""
        self._memory = memory
        self._rank = rank
        self._own = 0
        self._last_seen = {other: 0 for other in range(world_size) if other != rank}
        self._looks = dict.fromkeys(self._last_seen, 0)
        self._stopped = threading.Event()

    def start(self, on_lost: Callable[[int], None]) -> None:
        """Beat and look from now on. `on_lost` is called once, with the rank that stands still; in a thread of its own,
        since the others may wait for that rank where nothing interrupts them."""
        threading.Thread(target=self._run, args=(on_lost,), name="beats", daemon=True).start()

    def stop(self) -> None:
        """Beat no more, and look no more."""
        self._stopped.set()

    def beat_and_look(self) -> int | None:
        """Count once more; return a rank that has not counted for `LOOKS_WITHOUT_BEAT` looks."""
        self._own += 1
        _COUNT.pack_into(self._memory, self._rank * LINE_BYTES, self._own)
        for other, before in self._last_seen.items():
            (now,) = _COUNT.unpack_from(self._memory, other * LINE_BYTES)
            # Before its first beat a rank still loads.
            self._looks[other] = self._looks[other] + 1 if now == before and now else 0
            self._last_seen[other] = now
            if self._looks[other] >= LOOKS_WITHOUT_BEAT:
                return other
        return None

    def _run(self, on_lost: Callable[[int], None]) -> None:
        while not self._stopped.wait(BEAT_S):
            lost = self.beat_and_look()
            if lost is not None:
                on_lost(lost)
                return
