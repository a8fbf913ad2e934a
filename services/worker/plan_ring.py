"""Plans from rank 0 to a worker's other ranks, over memory that all of them map.

A plan is a message in parts. Part n lies in slot n % NUM_SLOTS, with its number before it, until every rank has taken
it. A byte over a socket, one a rank, says that a part is there: so that an idle rank sleeps, learns at once that rank
0 is gone, and reads nothing before it is written.
"""

import itertools
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

from gen.shoal.fleet.v1 import rank_pb2
from services.worker.engine.runner import RanksLostError
from services.worker.engine.step_plan import StepPlan
from services.worker.plan_message import plan_message, plan_of
from services.worker.rank_beats import BEAT_S, LOOKS_WITHOUT_BEAT

NUM_SLOTS = 16
SLOT_BYTES = 1 << 16
PATIENCE_S = 1.5
"""How long rank 0 waits for a rank to take a part, and a rank for the rest of a plan."""
_LOOK_S = 0.0005
_HEADER = struct.Struct("<QII")  # number of the part, its bytes, whether it is a plan's last
_COUNT = struct.Struct("<Q")
_PART_BYTES = SLOT_BYTES - _HEADER.size


def ring_bytes(world_size: int) -> int:
    """Return the memory that a ring takes: a multiple of a line of the processor's cache."""
    return NUM_SLOTS * SLOT_BYTES + world_size * 64


def _count_at(rank: int) -> int:
    """Where a rank says how many parts it has taken; rank 0, how often it was seen alive."""
    return NUM_SLOTS * SLOT_BYTES + rank * 64


class PlanWriter:
    """Rank 0's end."""

    def __init__(self, memory: memoryview, bells: Sequence[socket.socket]) -> None:
        """`memory`: `ring_bytes` of zeros. `bells`: of ranks 1, 2 and so on."""
        self._memory = memory
        self._bells = bells
        self._num_parts = 0
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def send(self, plan: StepPlan) -> None:
        """Give a plan to all ranks. Raises RanksLostError if one is gone, or does not take what it was given before."""
        data = plan_message(plan).SerializeToString()
        # A plan of nothing has no bytes, and is a part all the same.
        for first in range(0, max(1, len(data)), _PART_BYTES):
            self._send_part(data[first : first + _PART_BYTES], is_last=first + _PART_BYTES >= len(data))

    def is_a_rank_gone(self) -> bool:
        """Whether one has let go of its bell."""
        return any(select.select([bell], [], [], 0)[0] for bell in self._bells)

    def _beat(self) -> None:
        """Count as long as this process runs: that no plan comes does not say whether there is one to wait for."""
        for beat in itertools.count(1):
            _COUNT.pack_into(self._memory, _count_at(0), beat)
            time.sleep(BEAT_S)

    def _send_part(self, data: bytes, is_last: bool) -> None:
        self._await_room()
        at = self._num_parts % NUM_SLOTS * SLOT_BYTES
        self._num_parts += 1
        self._memory[at + _HEADER.size : at + _HEADER.size + len(data)] = data
        _HEADER.pack_into(self._memory, at, self._num_parts, len(data), is_last)
        for rank, bell in enumerate(self._bells, 1):
            try:
                bell.sendall(b"\0")
            except ConnectionError as cause:
                raise RanksLostError(f"rank {rank} is gone") from cause

    def _await_room(self) -> None:
        until_s = time.monotonic() + PATIENCE_S
        for rank in range(1, len(self._bells) + 1):
            while self._num_parts - _COUNT.unpack_from(self._memory, _count_at(rank))[0] >= NUM_SLOTS:
                if time.monotonic() > until_s:
                    raise RanksLostError(f"rank {rank} does not take its plans")
                time.sleep(_LOOK_S)


class PlanReader:
    """Another rank's end."""

    def __init__(self, memory: memoryview, rank: int, bell: socket.socket, front: socket.socket) -> None:
        """`front`: the front's connection; nothing is read from it."""
        self._memory = memory
        self._rank = rank
        self._bell = bell
        bell.settimeout(PATIENCE_S)
        self._front = front
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)
        self._poll.register(front, select.POLLIN)
        self._num_parts = 0

    def take(self) -> StepPlan | None:
        """Wait for the next plan; None when rank 0 or the front is gone. Raises RanksLostError."""
        data = b""
        self._await_bell()
        while True:
            part = self._take_part()
            if part is None:
                return None
            data += part[0]
            if part[1]:
                return plan_of(rank_pb2.RankPlan.FromString(data))

    def _await_bell(self) -> None:
        """Sleep until there is something to read, as long as rank 0 is alive.

        Looks are counted, not time: when the whole machine stood still, no beat is missing.
        """
        beat, looks = 0, 0
        while not self._poll.poll(BEAT_S * 1000):
            (now,) = _COUNT.unpack_from(self._memory, _count_at(0))
            looks = looks + 1 if now == beat else 0
            beat = now
            # Before its first beat, rank 0 still loads.
            if beat and looks >= LOOKS_WITHOUT_BEAT:
                raise RanksLostError("rank 0 stands still")

    def _take_part(self) -> tuple[bytes, bool] | None:
        if select.select([self._front], [], [], 0)[0]:
            return None
        try:
            rung = self._bell.recv(1)
        except ConnectionError:
            return None
        except TimeoutError as cause:
            raise RanksLostError("the rest of a plan did not come") from cause
        if not rung:
            return None
        at = self._num_parts % NUM_SLOTS * SLOT_BYTES
        self._num_parts += 1
        number, num_bytes, is_last = _HEADER.unpack_from(self._memory, at)
        if number != self._num_parts:
            raise RanksLostError(f"part {number} of plans lies where part {self._num_parts} should")
        data = bytes(self._memory[at + _HEADER.size : at + _HEADER.size + num_bytes])
        _COUNT.pack_into(self._memory, _count_at(self._rank), number)
        return data, bool(is_last)
