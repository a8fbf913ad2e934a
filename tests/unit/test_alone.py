"""Work in a task of its own: whoever waits for it is cancelled when asked to be, and gets its errors otherwise."""

import asyncio

import pytest

from services.common.alone import alone


async def fail() -> None:
    raise OSError("the part failed")


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def a_group_of_which_a_part_fails() -> None:
    async with asyncio.TaskGroup() as parts:
        parts.create_task(wait_for_ever())
        parts.create_task(fail())


@pytest.mark.parametrize("turns", range(1, 8))
async def test_who_is_cancelled_just_as_a_part_fails_is_cancelled(turns: int) -> None:
    waiting = asyncio.create_task(alone(a_group_of_which_a_part_fails()))
    for _ in range(turns):
        await asyncio.sleep(0)
    was_waiting = waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled() == was_waiting


async def test_errors_of_the_work_are_the_callers() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await alone(a_group_of_which_a_part_fails())
    assert [str(error) for error in raised.value.exceptions] == ["the part failed"]


async def test_a_cancelled_caller_leaves_nothing_running() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            steps.append("began")
            await wait_for_ever()
        finally:
            await asyncio.sleep(0)
            steps.append("ended")

    waiting = asyncio.create_task(alone(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert steps == ["began", "ended"]
