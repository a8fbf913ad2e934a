"""The most tokens that a choice may have, once the prompt is counted: what fits, and a refusal that says what would."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import InvalidRequest
from services.common.ids import RequestKey
from services.common.record.record import Attempt
from services.gateway.max_tokens import fitted_max_tokens
from services.gateway.model import Model, Room
from services.gateway.validation import validate
from services.scheduler.ledger import Reservation

MODEL = Model("smol", context_tokens=100, vocabulary_tokens=500, end_token_ids=(2,))


def a_request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hello", **fields)


def a_room(cache_tokens: int, context_tokens: int = 100) -> Room:
    """In blocks of a token."""
    return Room(cache_tokens, 1, context_tokens)


def fitted(num_prompt_tokens: int, max_tokens: int | None = None, room: Room | None = None, n: int = 1) -> int:
    return fitted_max_tokens(num_prompt_tokens, validate(a_request(max_tokens=max_tokens, n=n), MODEL), MODEL, room)


def test_without_max_tokens_the_answer_may_fill_what_is_left() -> None:
    assert fitted(40) == 60
    assert fitted(99) == 1
    assert fitted(40, room=a_room(64)) == 24
    assert fitted(40, room=a_room(64), n=2) == 11, "the prompt's last token is in a block of each choice"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "room", "reason", "value", "limit"),
    [
        (0, None, None, "INVALID_FIELD", "0 tokens", "at least 1"),
        (100, None, None, "PROMPT_TOO_LONG", "100 tokens", "100 tokens"),
        (100, 1, None, "PROMPT_TOO_LONG", "100 tokens", "Shorten it by 1"),
        (60, 41, None, "CONTEXT_EXCEEDED", "41", "leave 40"),
        (60, 20, a_room(79), "CAPACITY_EXCEEDED", "20", "79 tokens"),
        (80, None, a_room(80), "CAPACITY_EXCEEDED", "80 prompt tokens", "80 tokens"),
        (60, 10, a_room(1000, 64), "CONTEXT_EXCEEDED", "10", "64 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    num_prompt_tokens: int, max_tokens: int | None, room: Room | None, reason: str, value: str, limit: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fitted(num_prompt_tokens, max_tokens, room)
    assert caught.value.reason == reason
    assert value in caught.value.message
    assert limit in caught.value.message


def test_prompt_and_answer_may_fill_context_and_cache_to_the_last_token() -> None:
    assert fitted(60, 40) == 40
    assert fitted(60, 20, a_room(80)) == 20


def test_log_probabilities_are_bounded_by_what_one_message_can_tell() -> None:
    large = Model("large", context_tokens=1_000_000, vocabulary_tokens=500, end_token_ids=())

    def most(num_prompt_tokens: int, **fields: Any) -> int:
        return fitted_max_tokens(num_prompt_tokens, validate(a_request(**fields), large), large, None)

    assert most(10) == 999_990
    assert most(10, logprobs=0) == 999_990
    assert most(10, logprobs=19, n=5) == 10_000
    assert most(1_000, logprobs=9, prompt_logprobs=19) == 98_000
    assert most(50_000, prompt_logprobs=19) == 950_000
    for fields, field in (
        ({"logprobs": 19, "n": 5, "max_tokens": 10_001}, "logprobs"),
        ({"prompt_logprobs": 20}, "prompt_logprobs"),
    ):
        with pytest.raises(InvalidRequest, match="1000000 log-probabilities") as caught:
            most(50_000 if "prompt_logprobs" in fields else 10, **fields)
        assert (caught.value.reason, caught.value.field) == ("TOO_MANY_LOGPROBS", field)


@given(
    prompt_tokens=st.integers(1, 90),
    n=st.integers(1, 16),
    num_blocks=st.integers(1, 40),
    block_size_tokens=st.sampled_from([1, 4, 16]),
)
def test_what_is_taken_is_what_an_empty_worker_can_be_given(
    prompt_tokens: int, n: int, num_blocks: int, block_size_tokens: int
) -> None:
    room = Room(num_blocks, block_size_tokens, context_tokens=100)
    attempt = Attempt(1, "n")

    def could_hold(max_tokens: int) -> bool:
        reservation = Reservation(RequestKey("t/r"), attempt, prompt_tokens, 0, max_tokens, n, "")
        return reservation.num_blocks(block_size_tokens) <= num_blocks

    try:
        most = fitted(prompt_tokens, room=room, n=n)
    except InvalidRequest:
        assert not could_hold(1)
    else:
        assert could_hold(most)
        assert most == 100 - prompt_tokens or not could_hold(most + 1)
