"""deploy/compose: one command, and a gRPC client is answered; also with the worker's model on two processes."""

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import shoal
from tests.docker.images import BUILD_LIMIT_S, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_LIMIT_S + 120)]

PATIENT = shoal.RetryPolicy(outage_limit_s=180)
START_LIMIT_S = 180


class Composed:
    """The services of docker-compose.yml, under a project name and on ports of their own."""

    def __init__(self) -> None:
        v1 = shutil.which("docker-compose")
        self._words = ["docker-compose"] if v1 else ["docker", "compose"]
        self._words += ["-p", f"shoal-test-{os.getpid()}", "-f", "deploy/compose/docker-compose.yml"]

    def __call__(self, *words: str, **environ: str) -> str:
        return run(*self._words, *words, limit_s=START_LIMIT_S, SHOAL_PORT="0", SHOAL_HTTP_PORT="0", **environ)

    @property
    def address(self) -> str:
        return self("port", "gateway", "50051").strip()

    def engine_pids(self) -> list[int]:
        """Of the worker's engine, a process for each shard: as the worker has told last, in its container's numbers."""
        said = self("logs", "--no-color", "worker").splitlines()
        last = json.loads([line[line.index("{") :] for line in said if '"rank_pids"' in line][-1])
        return [last["engine_pid"], *last["rank_pids"]]


@pytest.fixture(scope="module")
def compose(images: dict[str, str]) -> Iterator[Composed]:
    compose = Composed()
    try:
        compose("up", "-d", "--no-build")
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "2")


@pytest.fixture(scope="module")
def sharded(compose: Composed) -> Composed:
    """The same once its user has asked for two processes: only the worker is made anew."""
    compose("up", "-d", "--no-build", SHOAL_SHARDS="2")
    return compose


@pytest.fixture(scope="module")
def case(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    return next(case for case in greedy_cases if case["name"] == "chat_capital")


@pytest.fixture(scope="module")
def story(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    """A case of many tokens."""
    return next(case for case in greedy_cases if case["name"] == "chat_multi_turn")


def begin(client: shoal.Client, case: dict[str, Any]) -> shoal.Stream:
    return client.generate(messages=case["messages"], temperature=0, max_tokens=case["max_tokens"])


def ask(client: shoal.Client, case: dict[str, Any]) -> shoal.Stream:
    stream = begin(client, case)
    stream.read()
    return stream


def test_it_answers_as_the_reference(compose: Composed, case: dict[str, Any]) -> None:
    with shoal.Client(compose.address, retries=PATIENT) as client:
        assert list(ask(client, case).token_ids) == case["output_token_ids"]


def test_redis_comes_back_with_what_it_knew(compose: Composed, case: dict[str, Any]) -> None:
    with shoal.Client(compose.address, retries=PATIENT) as client:
        asked = ask(client, case)
        compose("restart", "redis")
        assert client.get_request(asked.request_id).state is shoal.RequestState.FINISHED
        assert list(ask(client, case).token_ids) == case["output_token_ids"]


def test_an_answer_goes_on_when_a_process_of_a_sharded_worker_is_killed(
    sharded: Composed, story: dict[str, Any]
) -> None:
    with shoal.Client(sharded.address, retries=PATIENT) as client:
        stream = begin(client, story)
        next(iter(stream))
        before = sharded.engine_pids()
        assert len(before) == 2
        sharded("exec", "-T", "worker", "python", "-c", f"import os; os.kill({before[1]}, 9)")
        stream.read()
    assert list(stream.token_ids) == story["output_token_ids"]
    assert not set(before) & set(sharded.engine_pids()), "all of its processes are new"


def test_processes_of_a_sharded_worker_leave_dev_shm_alone(sharded: Composed) -> None:
    assert not sharded("exec", "-T", "worker", "ls", "-A", "/dev/shm")


def test_no_container_of_it_ended_or_was_found_ill(compose: Composed) -> None:
    states = run(
        "docker", "inspect", "--format", "{{.State.Status}} {{.RestartCount}} {{.State.Health.Status}}",
        *compose("ps", "-q").split(),
    ).splitlines()  # fmt: skip
    assert len(states) == 5
    assert {state.removesuffix(" starting").removesuffix(" healthy") for state in states} == {"running 0"}, states
