"""A fleet of processes on a Redis of its user's own: the image that is used everywhere."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from testcontainers.community.redis import RedisContainer

from tests.docker.container_fleet import redis_container
from tests.fleet.conftest import Fleet

pytestmark = pytest.mark.docker

PAUSE_S = 1.5
"""Below the time after which the leader would lose its lease: what is tested is the stream, not the leader."""


@pytest.fixture(scope="module")
def redis_image(docker: None) -> Iterator[RedisContainer]:
    with redis_container() as container:
        yield container


@pytest.fixture(scope="module")
def fleet(redis_image: RedisContainer, start: Callable[..., Fleet]) -> Fleet:
    host, port = redis_image.get_container_host_ip(), redis_image.get_exposed_port(redis_image.port)
    return start("--redis", f"redis://{host}:{port}")


@pytest.fixture(scope="module")
def story(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    return next(case for case in greedy_cases if case["name"] == "completion_once")


def test_it_answers_as_the_reference(fleet: Fleet, story: dict[str, Any]) -> None:
    with fleet.client() as client:
        stream = client.generate(story["prompt"], temperature=0, max_tokens=story["max_tokens"])
        stream.read()
    assert list(stream.token_ids) == story["output_token_ids"]


def test_an_answer_goes_on_while_redis_stands_still(
    redis_image: RedisContainer, fleet: Fleet, story: dict[str, Any]
) -> None:
    redis = redis_image.get_wrapped_container()
    with fleet.client() as client:
        stream = client.generate(story["prompt"], temperature=0, max_tokens=story["max_tokens"])
        next(iter(stream))
        redis.pause()
        try:
            time.sleep(PAUSE_S)  # the fault itself: Redis is away for so long
        finally:
            redis.unpause()
        stream.read()
    assert list(stream.token_ids) == story["output_token_ids"]
