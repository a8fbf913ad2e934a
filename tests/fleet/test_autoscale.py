"""`shoal up --autoscale`: a burst adds workers, quiet drains them, from zero and back; no answer is lost or changed."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shoal
from tests.fleet.conftest import Fleet, run_shoal

LIMIT_S = 120.0
MOST = 3


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Iterator[Fleet]:
    """From no worker to three; quick to find that it is quiet."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("SHOAL_WORK_WITHIN_MS", "1000")
        environ.setenv("SHOAL_QUIET_MS", "4000")
        environ.setenv("SHOAL_DEMAND_LOOK_MS", "100")
        yield start("--autoscale", f"0:{MOST}")


@pytest.fixture(scope="module")
def cases(greedy_cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shorter ones: the machine of the tests is small."""
    return sorted(greedy_cases, key=lambda case: len(case["prompt_token_ids"]) + case["max_tokens"])[:10]


def num_workers(fleet: Fleet) -> int:
    return len(fleet.of_kind("worker"))


def await_workers(fleet: Fleet, condition: Callable[[int], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition(num_workers(fleet)):
        assert time.monotonic() < deadline, f"{num_workers(fleet)} workers; {fleet.logs()}"
        time.sleep(0.05)


async def ask(client: shoal.AsyncClient, case: dict[str, Any]) -> None:
    """The reference's answer, token for token."""
    stream = client.generate(token_ids=case["prompt_token_ids"], temperature=0, max_tokens=case["max_tokens"])
    await stream.read()
    assert list(stream.token_ids) == case["output_token_ids"], case["name"]


async def test_from_zero_a_request_waits_for_the_first_worker_and_the_last_goes_when_it_is_quiet(
    fleet: Fleet, cases: list[dict[str, Any]]
) -> None:
    await_workers(fleet, lambda number: number == 0)
    async with fleet.async_client() as client:
        await ask(client, cases[0])
    await_workers(fleet, lambda number: number > 0)
    await_workers(fleet, lambda number: number == 0)


async def test_a_burst_adds_workers_and_those_that_go_lose_nothing(fleet: Fleet, cases: list[dict[str, Any]]) -> None:
    begun = len(fleet.lines)
    async with fleet.async_client() as client:
        async with asyncio.TaskGroup() as burst:
            for case in cases * 6:
                burst.create_task(ask(client, case))
        at_most = max(len([p for p in line if p.kind == "worker"]) for line in fleet.lines[begun:])
        assert at_most == MOST
        # One at a time goes on while workers are taken away; whichever has it hands it over.
        deadline = time.monotonic() + LIMIT_S
        while num_workers(fleet) > 1:
            assert time.monotonic() < deadline, fleet.logs()
            await ask(client, cases[-1])
    await_workers(fleet, lambda number: number == 0)


def test_mistakes_are_told_before_anything_starts(tmp_path_factory: pytest.TempPathFactory) -> None:
    for words in (("--autoscale", "3:1"), ("--autoscale", "3"), ("--autoscale", "1:2", "--workers", "2")):
        done = run_shoal(tmp_path_factory.mktemp("none"), "up", *words)
        assert done.returncode == 2
        assert "autoscale" in done.stderr
