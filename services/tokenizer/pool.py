"""A pool of processes that encode and decode, each beside the front at the end of a socket pair.

One task a seat keeps one process there: it starts the process, hands it one job at a time, and starts another when it
is lost. A job whose process was lost is done once more, by whichever process is free.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import services
from services.common.errors import DeadlineExceeded, Internal, InvalidRequest, ShoalError, Unavailable
from services.tokenizer.frames import HEADER, Answer, Operation, frame, header
from services.tokenizer.job_queue import Job, JobQueue

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
START_LIMIT_S = 60.0
MAX_RESTART_DELAY_S = 5.0
LEAVE_S = 0.2
READ_BUFFER_BYTES = 1 << 20
# Copying more at once would block the event loop for milliseconds.
CHUNK_BYTES = 1 << 18
MIN_RETRY_MS, MAX_RETRY_MS = 50, 5_000


class PoolStartError(Exception):
    """The first process ended before it was ready; its own words are on standard error."""

    shown_in_logs = True


class _ProcessLostError(Exception):
    """A process ended, or did not answer in time and has to be ended."""


class _NotBegunError(_ProcessLostError):
    """A process ended before it had read the job: the job had no part in it."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Sizes of a pool. `job_limit_s`: longest time that a process may work at one input, in seconds; `format_limit_s`:
    at one form of answers."""

    num_processes: int
    max_queued_jobs: int
    max_queued_bytes: int
    job_limit_s: float
    format_limit_s: float


class Pool:
    """Runs jobs in other processes. Its callers and `run` share one event loop, which is never blocked."""

    def __init__(self, model_path: Path, limits: PoolLimits) -> None:
        self._model_path = model_path.absolute()
        self._limits = limits
        self._queue = JobQueue(limits.max_queued_jobs, limits.max_queued_bytes)
        self._mean_job_s = 0.001
        self.ready = asyncio.Event()
        """Set once a process can work."""

    @property
    def num_queued(self) -> int:
        """Jobs that wait for a process."""
        return len(self._queue)

    async def run(self) -> None:
        """Keep all processes alive until cancelled; then end them. Raises PoolStartError if none can start."""
        async with asyncio.TaskGroup() as seats:
            for index in range(self._limits.num_processes):
                # A pool of one has nobody to spare for short inputs.
                seats.create_task(self._keep_seat(long_too=index > 0 or self._limits.num_processes == 1))

    async def submit(self, operation: Operation, payload: bytes) -> bytes:
        """Run one serialized request and return its serialized response.

        Raises InvalidRequest for an input that cannot be taken, Exhausted if the queue is full, DeadlineExceeded if the
        work takes too long, Unavailable if its processes were lost twice, Internal for a defect. Cancelling the call
        takes it from the queue.
        """
        job = Job(operation, payload, asyncio.get_running_loop().create_future())
        self._queue.put(job, self._retry_after_ms())
        try:
            return await job.answer
        finally:
            self._queue.forget(job)

    async def _keep_seat(self, long_too: bool) -> None:
        num_failed_starts = 0
        while True:
            try:
                async with _started_process(self._model_path) as link:
                    num_failed_starts = 0
                    self.ready.set()
                    while (job := await self._queue.take(long_too, link.gone)) is not None:
                        await self._run_job(job, link)
                    raise _ProcessLostError("it ended while it had nothing to do")
            except _ProcessLostError as error:
                logger.warning("a pool process was lost; another takes its seat", extra={"cause": str(error)})
            except PoolStartError:
                if not self.ready.is_set():
                    raise
                num_failed_starts += 1
                delay_s = min(MAX_RESTART_DELAY_S, 0.1 * 2**num_failed_starts)
                logger.exception("a pool process could not start", extra={"retry_in_s": delay_s})
                await asyncio.sleep(delay_s)

    async def _run_job(self, job: Job, link: "_Link") -> None:
        """Have one job done and resolve it. Raises _ProcessLostError, with the job taken care of."""
        if job.answer.done():
            return
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        is_form = job.operation is Operation.CHECK_FORMAT
        limit_s = self._limits.format_limit_s if is_form else self._limits.job_limit_s
        try:
            async with asyncio.timeout(limit_s):
                answer, payload = await link.ask(job.operation, job.payload)
        except TimeoutError as error:
            limit_ms = round(limit_s * 1000)
            _fail(job, _form_too_complex(limit_ms) if is_form else _input_too_long(limit_ms))
            raise _ProcessLostError(f"no answer within {limit_ms} ms") from error
        except _NotBegunError:
            self._queue.put_back(job)
            raise
        except _ProcessLostError:
            self._give_another_chance(job)
            raise
        self._mean_job_s += 0.1 * (loop.time() - started_s - self._mean_job_s)
        _resolve(job, answer, payload)

    def _give_another_chance(self, job: Job) -> None:
        job.attempts += 1
        if job.attempts < MAX_ATTEMPTS:
            self._queue.put_back(job)
            return
        message = f"{job.attempts} processes were lost while they worked at this input; try again later"
        _fail(job, Unavailable(message, reason="TOKENIZER_PROCESS_LOST", retry_after_ms=MAX_RETRY_MS))

    def _retry_after_ms(self) -> int:
        """When about the queue of now will have been worked off."""
        expected_ms = 1000 * self._mean_job_s * len(self._queue) / self._limits.num_processes
        return round(min(max(expected_ms, MIN_RETRY_MS), MAX_RETRY_MS))


@dataclass(frozen=True, slots=True)
class _Link:
    """The front's end of the socket pair to one process."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Future[int]
    """Done once the process has ended."""

    async def ask(self, operation: Operation, payload: bytes) -> tuple[Answer, bytes]:
        """Send a frame and wait for the one that answers it. Raises _ProcessLostError, or _NotBegunError.

        A Unix socket whose other end is closed says whether everything sent was read there: if so, it ends; if not, it
        reports an error, on reading (ECONNRESET) as on writing (EPIPE).
        """
        if self.reader.at_eof():
            raise _NotBegunError("it had hung up")
        try:
            await self._send(operation, payload)
            return await self.receive()
        except ConnectionError as error:
            raise _NotBegunError("it hung up without reading") from error

    async def _send(self, operation: Operation, payload: bytes) -> None:
        if len(payload) <= CHUNK_BYTES:
            self.writer.write(frame(operation, payload))
            await self.writer.drain()
            return
        self.writer.write(header(operation, payload))
        for start in range(0, len(payload), CHUNK_BYTES):
            self.writer.write(payload[start : start + CHUNK_BYTES])
            await self.writer.drain()

    async def receive(self) -> tuple[Answer, bytes]:
        """Wait for a frame. Raises _ProcessLostError if the process is gone, or ConnectionError."""
        try:
            num_bytes, code = HEADER.unpack(await self.reader.readexactly(HEADER.size))
            return Answer(code), await self.reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError as error:
            raise _ProcessLostError("it hung up") from error


@asynccontextmanager
async def _started_process(model_path: Path) -> AsyncIterator[_Link]:
    """Start a process and yield the link to it once it is ready; end it on leaving. Raises PoolStartError."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.tokenizer.pool_process", str(theirs.fileno()), str(model_path)),
            pass_fds=[theirs.fileno()],
            cwd=Path(services.__path__[0]).parent,
            stdin=asyncio.subprocess.DEVNULL,
            # Standard output is for the line that says the service is ready.
            stdout=asyncio.subprocess.DEVNULL,
        )
    gone = asyncio.ensure_future(process.wait())
    reader, writer = await asyncio.open_connection(sock=ours, limit=READ_BUFFER_BYTES)
    try:
        link = _Link(reader, writer, gone)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await link.receive()
        except (_ProcessLostError, ConnectionError, TimeoutError) as error:
            raise PoolStartError(f"pool process {process.pid} ended, or was not ready in {START_LIMIT_S} s") from error
        logger.info("a pool process is ready", extra={"pool_pid": process.pid})
        yield link
    finally:
        writer.close()
        # An idle process ends by itself when its link is closed. One at work would go on for nobody.
        await asyncio.wait({gone}, timeout=LEAVE_S)
        if not gone.done():
            process.kill()
        await gone


def _resolve(job: Job, answer: Answer, payload: bytes) -> None:
    if answer is Answer.DONE:
        if not job.answer.done():
            job.answer.set_result(payload)
        return
    text = payload.decode()
    if answer is Answer.REFUSED:
        field, _, problem = text.partition("\n")
        _fail(job, InvalidRequest(problem, reason="INVALID_INPUT", field=field))
        return
    logger.error("a pool process failed by a defect", extra={"cause": text})
    _fail(job, Internal("an internal error of the tokenizer; it is in its log", reason="INTERNAL"))


def _input_too_long(limit_ms: int) -> ShoalError:
    return DeadlineExceeded(f"the input took over {limit_ms} ms of work; send a shorter one")


def _form_too_complex(limit_ms: int) -> ShoalError:
    return InvalidRequest(
        f"response_format took over {limit_ms} ms to compile; make it smaller, or bound its repetitions",
        reason="FORMAT_TOO_COMPLEX",
        field="response_format",
    )


def _fail(job: Job, error: ShoalError) -> None:
    if not job.answer.done():  # else its caller is gone
        job.answer.set_exception(error)
