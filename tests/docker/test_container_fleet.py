"""A fleet of containers keeps the promises of a fleet of processes."""

from collections.abc import Iterator
from typing import Any

import pytest

import shoal
from tests.docker.container_fleet import ContainerFleet, container_fleet
from tests.docker.images import BUILD_LIMIT_S

pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_LIMIT_S + 120)]

PATIENT = shoal.RetryPolicy(outage_limit_s=180)
"""The first call waits until the gateway is there, as any client's does."""
STOP_LIMIT_S = 25


@pytest.fixture(scope="module")
def fleet(images: dict[str, str]) -> Iterator[ContainerFleet]:
    with container_fleet(images) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def client(fleet: ContainerFleet) -> Iterator[shoal.Client]:
    with shoal.Client(fleet.address, retries=PATIENT) as client:
        yield client


@pytest.fixture(scope="module")
def story(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    """A case of many tokens."""
    return next(case for case in greedy_cases if case["name"] == "completion_code")


def ask(client: shoal.Client, case: dict[str, Any]) -> shoal.Stream:
    question = {"messages": case["messages"]} if case["kind"] == "chat" else {"prompt": case["prompt"]}
    return client.generate(**question, temperature=0, max_tokens=case["max_tokens"])


def test_it_answers_as_the_reference(client: shoal.Client, greedy_cases: list[dict[str, Any]]) -> None:
    for name in ("chat_capital", "completion_emoji"):
        case = next(case for case in greedy_cases if case["name"] == name)
        stream = ask(client, case)
        stream.read()
        assert list(stream.token_ids) == case["output_token_ids"], name


def test_an_answer_goes_on_when_its_workers_container_is_killed(
    fleet: ContainerFleet, client: shoal.Client, story: dict[str, Any]
) -> None:
    stream = ask(client, story)
    next(iter(stream))
    fleet.container(worker_of(fleet, stream.request_id)).kill()
    stream.read()
    assert list(stream.token_ids) == story["output_token_ids"]
    assert {"placed", "requeued"} <= {decision.what for decision in client.get_request(stream.request_id).decisions}


def test_a_stopped_container_ends_by_itself(fleet: ContainerFleet) -> None:
    """As its container's first process a service must take SIGTERM itself: nobody does so for it."""
    for name in fleet.running():
        container = fleet.container(name)
        container.stop(timeout=STOP_LIMIT_S)
        assert container.wait()["StatusCode"] == 0, f"{name}\n{fleet.logs()}"
    assert not fleet.running()


def worker_of(fleet: ContainerFleet, request_id: str) -> str:
    """The container that has begun this request, as its log tells."""
    (name,) = [
        name
        for name in ("worker-0", "worker-1")
        if any(request_id in line and '"started"' in line for line in fleet.log(name))
    ]
    return name
