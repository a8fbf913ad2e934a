"""The pool answers whatever happens to its processes, and never blocks the event loop that asks it."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from gen.shoal.fleet.v1.tokenizer_pb2 import CheckFormatRequest, EncodeRequest, EncodeResponse
from gen.shoal.inference.v1.inference_pb2 import ResponseFormat
from services.common.errors import DeadlineExceeded, Exhausted, InvalidRequest, Unavailable
from services.common.model.location import default_model_path
from services.tokenizer.frames import Operation
from services.tokenizer.job_queue import LONG_INPUT_BYTES, MAX_BYTES_TOGETHER, MAX_TOGETHER, Job, JobQueue
from services.tokenizer.pool import Pool, PoolLimits, PoolStartError
from tests.unit.eventually import eventually

SHORT = EncodeRequest(prompt="The quick brown fox").SerializeToString()
SHORT_TOKENS = [504, 2365, 6354, 16438]
# About a second of work: letters without a space are one long word.
LONG = EncodeRequest(prompt="abcdefgh" * (1 << 17)).SerializeToString()


@asynccontextmanager
async def a_pool(
    num_processes: int = 2,
    max_queued_jobs: int = 100,
    max_queued_bytes: int = 1 << 26,
    job_limit_s: float = 60.0,
    format_limit_s: float = 60.0,
) -> AsyncIterator[Pool]:
    limits = PoolLimits(num_processes, max_queued_jobs, max_queued_bytes, job_limit_s, format_limit_s)
    pool = Pool(default_model_path(), limits)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(pool.run())
        await pool.ready.wait()
        yield pool
        running.cancel()


async def encode(pool: Pool, payload: bytes) -> list[int]:
    return list(EncodeResponse.FromString(await pool.submit(Operation.ENCODE, payload)).token_ids)


def pool_pids() -> set[int]:
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "services.tokenizer.pool_process" in child.cmdline()
    }


async def until_processes(num_processes: int, besides: AbstractSet[int] = frozenset()) -> set[int]:
    await eventually(lambda: len(pool_pids() - besides) >= num_processes)
    return pool_pids() - besides


async def until_working() -> None:
    """Until some process has been handed a job: jobs are handed over as soon as the loop turns."""
    await asyncio.sleep(0.1)


async def test_many_callers_are_answered_at_once() -> None:
    async with a_pool() as pool:
        answers = await asyncio.gather(*(encode(pool, SHORT) for _ in range(50)))
    assert answers == [SHORT_TOKENS] * 50


async def test_all_processes_end_with_the_pool() -> None:
    async with a_pool():
        assert await until_processes(2)
    assert pool_pids() == set()


async def test_a_process_killed_at_work_is_replaced_and_its_work_done() -> None:
    async with a_pool(num_processes=1) as pool:
        (pid,) = pool_pids()
        answer = asyncio.create_task(encode(pool, LONG))
        await until_working()
        os.kill(pid, signal.SIGKILL)
        assert len(await answer) > 100_000
        assert await until_processes(1) != {pid}


async def test_a_process_killed_while_idle_costs_no_call_its_answer() -> None:
    async with a_pool() as pool:
        killed = await until_processes(2)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*(encode(pool, SHORT) for _ in range(5)))
        assert answers == [SHORT_TOKENS] * 5
        await until_processes(2, besides=killed)


async def test_work_that_loses_two_processes_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with a_pool(num_processes=1) as pool:
        (first,) = pool_pids()
        answer = asyncio.create_task(encode(pool, LONG))
        await until_working()
        os.kill(first, signal.SIGKILL)
        (second,) = await until_processes(1, besides={first})
        await eventually(lambda: caplog.messages.count("a pool process is ready") == 2)
        await until_working()
        os.kill(second, signal.SIGKILL)
        with pytest.raises(Unavailable) as caught:
            await answer
        assert caught.value.retry_after_ms > 0
        assert await encode(pool, SHORT) == SHORT_TOKENS


async def test_short_inputs_do_not_wait_for_long_ones() -> None:
    async with a_pool() as pool:
        await until_processes(2)
        long_answers = [asyncio.create_task(encode(pool, LONG)) for _ in range(3)]
        await until_working()
        assert await encode(pool, SHORT) == SHORT_TOKENS
        assert not any(answer.done() for answer in long_answers[1:])
        await asyncio.gather(*long_answers)


async def test_a_full_queue_refuses_with_a_hint() -> None:
    async with a_pool(num_processes=1, max_queued_jobs=1) as pool:
        working = asyncio.create_task(encode(pool, LONG))
        await until_working()
        waiting = asyncio.create_task(encode(pool, SHORT))
        await asyncio.sleep(0)
        with pytest.raises(Exhausted, match="1 inputs of") as caught:
            await encode(pool, SHORT)
        assert caught.value.retry_after_ms >= 50
        waiting.cancel()
        await asyncio.sleep(0)
        assert await encode(pool, SHORT) == SHORT_TOKENS  # A call that was given up holds no place.
        await working


async def test_a_queue_is_also_full_by_bytes() -> None:
    async with a_pool(max_queued_bytes=len(LONG) - 1) as pool:
        with pytest.raises(Exhausted):
            await encode(pool, LONG)


async def test_an_input_that_takes_too_long_is_ended() -> None:
    async with a_pool(num_processes=1, job_limit_s=0.1) as pool:
        with pytest.raises(DeadlineExceeded, match="100 ms"):
            await encode(pool, LONG)
        assert await encode(pool, SHORT) == SHORT_TOKENS


async def test_a_form_that_takes_too_long_to_compile_is_refused_and_its_process_ended() -> None:
    patterns = [{"type": "string", "pattern": f".*{one}.*{other}"} for one in "abcdefgh" for other in "klmnop"]
    form = ResponseFormat(json_schema=json.dumps({"allOf": patterns}))  # Some minutes, without a limit.
    async with a_pool(num_processes=1, format_limit_s=1.5) as pool:
        (pid,) = pool_pids()
        with pytest.raises(InvalidRequest, match="1500 ms") as caught:
            await pool.submit(Operation.CHECK_FORMAT, CheckFormatRequest(response_format=form).SerializeToString())
        assert (caught.value.field, caught.value.reason) == ("response_format", "FORMAT_TOO_COMPLEX")
        assert await encode(pool, SHORT) == SHORT_TOKENS
        assert pid not in pool_pids()


async def test_a_refused_input_names_its_field() -> None:
    async with a_pool(num_processes=1) as pool:
        with pytest.raises(InvalidRequest) as caught:
            await encode(pool, b"")
        assert caught.value.field == "input"


async def test_the_event_loop_is_not_blocked_by_megabytes() -> None:
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:  # CPU time of this thread: that other processes run meanwhile says nothing.
            before_s = time.thread_time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.thread_time() - before_s)

    payload = EncodeRequest(prompt="The quick brown fox. " * 190_000).SerializeToString()
    async with a_pool(num_processes=1) as pool, asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(watch())
        raw = await pool.submit(Operation.ENCODE, payload)
        watcher.cancel()
    assert len(raw) > 1_000_000
    before_s = time.thread_time()
    list(EncodeResponse.FromString(raw).token_ids)
    reading_s = time.thread_time() - before_s
    assert longest_s < reading_s / 4, "its tokens are not read here, only passed on"


async def test_a_pool_whose_model_cannot_be_read_does_not_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.RaisesGroup(PoolStartError):
        await Pool(path, PoolLimits(1, 1, 1, 1.0, 1.0)).run()
    assert "not a GGUF file" in capfd.readouterr().err


async def test_an_input_that_is_refused_harms_none_that_went_with_it() -> None:
    async with a_pool(num_processes=1) as pool:
        answers = await asyncio.gather(
            *(encode(pool, EncodeRequest().SerializeToString() if number % 3 == 0 else SHORT) for number in range(30)),
            return_exceptions=True,
        )
    for number, answer in enumerate(answers):
        if number % 3 == 0:
            assert isinstance(answer, InvalidRequest)
        else:
            assert answer == SHORT_TOKENS


def a_job(num_bytes: int = 10, attempts: int = 0) -> Job:
    return Job(Operation.ENCODE, b"x" * num_bytes, asyncio.get_running_loop().create_future(), attempts)


async def taken_together(first: Job, waiting: list[Job], num_processes: int = 1) -> list[Job]:
    queue = JobQueue(max_jobs=1_000, max_bytes=1 << 30)
    for job in waiting:
        queue.put(job, 0)
    together = queue.take_along(first, num_processes)
    assert together[0] is first
    assert len(queue) == len(waiting) - len(together) + 1
    return together


async def test_a_process_is_given_its_share_of_short_inputs_and_not_more_than_a_few() -> None:
    assert len(await taken_together(a_job(), [a_job() for _ in range(9)], num_processes=2)) == 5
    assert len(await taken_together(a_job(), [a_job() for _ in range(100)])) == MAX_TOGETHER
    assert len(await taken_together(a_job(), [a_job(MAX_BYTES_TOGETHER // 3) for _ in range(9)])) == 3
    assert len(await taken_together(a_job(), [])) == 1


async def test_what_is_long_or_was_at_work_in_a_lost_process_goes_alone() -> None:
    for lonely in (a_job(LONG_INPUT_BYTES + 1), a_job(attempts=1)):
        assert await taken_together(lonely, [a_job() for _ in range(9)]) == [lonely]
        first, second = a_job(), a_job()
        assert await taken_together(first, [second, lonely, a_job()]) == [first, second]
