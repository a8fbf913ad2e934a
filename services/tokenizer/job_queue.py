"""Work that waits for a process: bounded, first come first served, but short inputs need not wait for long ones."""

import asyncio
from collections import deque
from dataclasses import dataclass

from services.common.errors import Exhausted
from services.tokenizer.frames import Operation

# Encoding this much takes about 15 ms. At most all processes but one work at longer inputs.
LONG_INPUT_BYTES = 1 << 16
MAX_TOGETHER = 16
MAX_BYTES_TOGETHER = 1 << 15
"""About 8 ms of work: the first of them waits for the last."""


@dataclass(slots=True, eq=False)
class Job:
    """One call's work. The pool alone resolves `answer`, and counts in `attempts` the processes lost at work on it.

    The caller may cancel `answer`.
    """

    operation: Operation
    payload: bytes
    answer: asyncio.Future[bytes]
    attempts: int = 0

    @property
    def is_long(self) -> bool:
        """Whether only some of the processes may work at it. How long a form takes, its size does not say."""
        return len(self.payload) > LONG_INPUT_BYTES or self.operation is Operation.CHECK_FORMAT

    @property
    def goes_alone(self) -> bool:
        """Whether a process must not be given anything else with it."""
        return self.is_long or self.attempts > 0


class JobQueue:
    """Jobs in order of arrival. One pool owns it, and all its uses are in one event loop."""

    def __init__(self, max_jobs: int, max_bytes: int) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: deque[Job] = deque()
        self._num_bytes = 0
        self._bells: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job, retry_after_ms: int) -> None:
        """Add a job at the end. Raises Exhausted, with the given hint, if the queue is full."""
        if len(self._jobs) >= self._max_jobs or self._num_bytes + len(job.payload) > self._max_bytes:
            raise Exhausted(
                f"the tokenizer is busy: {len(self._jobs)} inputs of {self._num_bytes} bytes wait, of at most "
                f"{self._max_jobs} and {self._max_bytes} bytes; come back in {retry_after_ms} ms",
                reason="TOKENIZER_FULL",
                retry_after_ms=retry_after_ms,
            )
        self._jobs.append(job)
        self._added(job)

    def put_back(self, job: Job) -> None:
        """Add a job that was taken before at the front, beyond the limits: it was within them once."""
        self._jobs.appendleft(job)
        self._added(job)

    async def take(self, long_too: bool, gone: asyncio.Future[int]) -> Job | None:
        """Remove the oldest job, or the oldest that is not long, once there is one. None once `gone` is done."""
        while not gone.done():
            for job in self._jobs:
                if long_too or not job.is_long:
                    self.forget(job)
                    return job
            bell = asyncio.get_running_loop().create_future()
            self._bells.append(bell)
            await asyncio.wait({bell, gone}, return_when=asyncio.FIRST_COMPLETED)
        return None

    def take_along(self, first: Job, num_processes: int) -> list[Job]:
        """Remove what goes to the process together with `first`, which is in front: a share of what waits.

        Long inputs go alone, and so do those at which a process was lost: whoever is to blame is found by that.
        """
        together, num_bytes = [first], len(first.payload)
        if first.goes_alone:
            return together
        most = min(MAX_TOGETHER, -(-(1 + len(self._jobs)) // num_processes))
        for job in list(self._jobs):
            num_bytes += len(job.payload)
            if len(together) >= most or num_bytes > MAX_BYTES_TOGETHER or job.goes_alone:
                break
            self.forget(job)
            together.append(job)
        return together

    def forget(self, job: Job) -> None:
        """Remove a job if it still waits."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._num_bytes -= len(job.payload)

    def _added(self, job: Job) -> None:
        self._num_bytes += len(job.payload)
        bells, self._bells = self._bells, []
        for bell in bells:
            if not bell.done():
                bell.set_result(None)
