"""How the processes of a sharded worker see that another one stands still, whatever they themselves wait for.

Each counts as long as it lives. Looks are counted, not time: when the whole machine stood still, no beat is missing.
"""

import struct
import threading
from collections.abc import Callable

BEAT_S = 0.2
LOOKS_WITHOUT_BEAT = 5
LINE_BYTES = 64
_COUNT = struct.Struct("<Q")


class RankBeats:
    """One rank's beats, and its watch over those of the others."""

    def __init__(
        self, memory: memoryview, rank: int, world_size: int, on_lost: Callable[[int], None], beat_s: float = BEAT_S
    ) -> None:
        """`memory`: a line a rank, zeros at first. `on_lost` is called once, with the rank that stands still; in a
        thread of its own, since the others may wait for that rank where nothing interrupts them."""
        self._memory = memory
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._on_lost = on_lost
        self._beat_s = beat_s
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="beats", daemon=True).start()

    def stop(self) -> None:
        """Beat no more, and look no more."""
        self._stopped.set()

    def _run(self) -> None:
        beats = dict.fromkeys(self._others, 0)
        looks = dict.fromkeys(self._others, 0)
        own = 0
        while not self._stopped.wait(self._beat_s):
            own += 1
            _COUNT.pack_into(self._memory, self._rank * LINE_BYTES, own)
            for other in self._others:
                (beat,) = _COUNT.unpack_from(self._memory, other * LINE_BYTES)
                # Before its first beat a rank still loads.
                looks[other] = looks[other] + 1 if beat == beats[other] and beat else 0
                beats[other] = beat
                if looks[other] >= LOOKS_WITHOUT_BEAT:
                    self._on_lost(other)
                    return
