"""Every field of a request has its limits, and a refusal names the field, the value and the limit (gateway)."""

import math
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import InvalidRequest, NotFound, ShoalError, to_status
from services.common.ids import TenantId
from services.common.record.history import NOTHING, Held
from services.gateway.identity import DEFAULT_TENANT, bearer_of, cache_salt, stated_tenant_of, traceparent_of
from services.gateway.model import Model
from services.gateway.validation import (
    check_request_id,
    digest,
    encodable,
    held_by_client,
    validate,
)

MODEL = Model("smol", context_tokens=100, vocabulary_tokens=500, end_token_ids=(2,))


def a_request(**fields: Any) -> pb.GenerateRequest:
    if not {"prompt", "chat", "token_ids"} & set(fields):
        fields["prompt"] = "hello"
    return pb.GenerateRequest(**fields)


def a_chat(*roles: str) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content="hi") for role in roles])


def one_of(*texts: str) -> pb.ResponseFormat:
    return pb.ResponseFormat(choices=pb.ResponseFormat.Choices(texts=texts))


def refusal(request: pb.GenerateRequest) -> ShoalError:
    with pytest.raises(ShoalError) as caught:
        validate(request, MODEL)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "field", "value", "limit"),
    [
        ({"prompt": ""}, "prompt", "empty", "at least 1"),
        ({"max_tokens": 0}, "max_tokens", "0", "1 to 99"),
        ({"max_tokens": 2**32 - 1}, "max_tokens", "4294967295", "1 to 99"),
        ({"sampling": pb.Sampling(temperature=math.nan)}, "sampling.temperature", "nan", "100"),
        ({"sampling": pb.Sampling(temperature=math.inf)}, "sampling.temperature", "inf", "100"),
        ({"sampling": pb.Sampling(temperature=-1)}, "sampling.temperature", "-1.0", "100"),
        ({"sampling": pb.Sampling(top_p=0)}, "sampling.top_p", "0.0", "at most 1"),
        ({"sampling": pb.Sampling(top_p=2)}, "sampling.top_p", "2.0", "at most 1"),
        ({"sampling": pb.Sampling(top_p=math.nan)}, "sampling.top_p", "nan", "at most 1"),
        ({"sampling": pb.Sampling(top_k=1_000_001)}, "sampling.top_k", "1000001", "1000000"),
        ({"sampling": pb.Sampling(min_p=-1)}, "sampling.min_p", "-1.0", "1"),
        ({"sampling": pb.Sampling(repetition_penalty=0)}, "sampling.repetition_penalty", "0.0", "10"),
        ({"sampling": pb.Sampling(presence_penalty=math.nan)}, "sampling.presence_penalty", "nan", "-2 to 2"),
        ({"sampling": pb.Sampling(repetition_penalty=10.5)}, "sampling.repetition_penalty", "10.5", "10"),
        ({"sampling": pb.Sampling(frequency_penalty=2.5)}, "sampling.frequency_penalty", "2.5", "-2 to 2"),
        ({"sampling": pb.Sampling(logit_bias={500: 1})}, "sampling.logit_bias[500]", "500", "below 500"),
        ({"sampling": pb.Sampling(logit_bias={3: 100.5})}, "sampling.logit_bias[3]", "100.5", "-100 to 100"),
        ({"sampling": pb.Sampling(logit_bias={3: math.nan})}, "sampling.logit_bias[3]", "nan", "-100 to 100"),
        ({"sampling": pb.Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))}, "sampling.logit_bias", "1025", "1024"),
        ({"stop": ["x"] * 17}, "stop", "17", "16"),
        ({"stop": ["x", ""]}, "stop[1]", "0 bytes", "1 to 256"),
        ({"stop": ["é" * 129]}, "stop[0]", "258 bytes", "1 to 256"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "65", "64"),
        ({"stop_token_ids": [1, 500]}, "stop_token_ids[1]", "500", "below 500"),
        ({"chat": pb.Chat()}, "chat.messages", "0", "1 to 1024"),
        ({"chat": a_chat(*["user"] * 1025)}, "chat.messages", "1025", "1 to 1024"),
        ({"chat": a_chat("user", "robot")}, "chat.messages[1].role", "'robot'", "system, user, assistant"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids", "empty", "at least 1"),
        ({"token_ids": pb.TokenIds(ids=[1, 2, 500])}, "token_ids.ids[2]", "500", "below 500"),
        ({"n": 17}, "n", "17", "16"),
        ({"logprobs": 21}, "logprobs", "21", "20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "21", "20"),
        ({"request_id": "a\x00b"}, "request_id", "'a\\x00b'", "A-Z a-z 0-9"),
        ({"request_id": "x" * 1_000_000}, "request_id", "1000000 characters", "1 to 128"),
        ({"request_id": "a/b"}, "request_id", "'a/b'", "A-Z a-z 0-9"),
        ({"response_format": pb.ResponseFormat()}, "response_format", "no form", "json_schema, regex, choices"),
        (
            {"response_format": pb.ResponseFormat(json_object=False)},
            "response_format.json_object",
            "false",
            "expected true",
        ),
        (
            {"response_format": pb.ResponseFormat(json_schema=" " * 65_537)},
            "response_format.json_schema",
            "65537 bytes",
            "1 to 65536",
        ),
        ({"response_format": pb.ResponseFormat(json_schema="")}, "response_format.json_schema", "0 bytes", "1 to"),
        ({"response_format": pb.ResponseFormat(regex="é" * 2_049)}, "response_format.regex", "4098 bytes", "4096"),
        ({"response_format": one_of()}, "response_format.choices.texts", "length 0", "1 to 1024"),
        ({"response_format": one_of(*["a"] * 1_025)}, "response_format.choices.texts", "length 1025", "1 to 1024"),
        ({"response_format": one_of("a", "")}, "response_format.choices.texts[1]", "empty", "at least 1"),
        ({"response_format": one_of("a" * 65_537)}, "response_format.choices.texts", "65537 bytes", "65536"),
        ({"priority": 7}, "priority", "7", "Priority"),
    ],
)
def test_a_bad_field_is_refused_by_name_with_its_value_and_its_limit(
    fields: dict[str, Any], field: str, value: str, limit: str
) -> None:
    error = refusal(a_request(**fields))
    assert isinstance(error, InvalidRequest)
    assert error.field == field
    assert value in error.message
    assert limit in error.message
    assert len(error.message) < 300, "a refusal does not send a megabyte back"
    assert to_status(error).code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_no_input_at_all_is_refused() -> None:
    assert refusal(pb.GenerateRequest()).field == "input"


def test_an_unknown_model_is_not_found_and_the_known_one_is_named() -> None:
    error = refusal(a_request(model="gpt-9"))
    assert isinstance(error, NotFound)
    assert "'smol'" in error.message
    assert validate(a_request(model="smol"), MODEL)


def test_defaults_are_filled_in() -> None:
    valid = validate(a_request(), MODEL)
    assert (valid.sampling.temperature, valid.sampling.top_p, valid.sampling.top_k) == (1, 1, 0)
    assert (valid.sampling.min_p, valid.sampling.repetition_penalty, dict(valid.sampling.logit_bias)) == (0, 1, {})
    assert (valid.logprobs, valid.prompt_logprobs) == (None, None)
    assert not valid.sampling.HasField("seed"), "drawn where the request is accepted"
    assert (valid.n, valid.priority, valid.max_tokens) == (1, pb.PRIORITY_STANDARD, None)


def test_limits_themselves_are_taken() -> None:
    biases = {token: 100.0 if token % 2 else -100.0 for token in range(500)}
    sampling = pb.Sampling(
        temperature=100, top_p=1, top_k=1_000_000, seed=2**64 - 1, repetition_penalty=10, min_p=1, frequency_penalty=-2,
        presence_penalty=2, logit_bias=biases,
    )  # fmt: skip
    request = a_request(
        request_id="A" * 128,
        sampling=sampling,
        stop=["x" * 256] * 16,
        stop_token_ids=range(64),
        max_tokens=99,
        n=16,
        logprobs=20,
        prompt_logprobs=0,
        deadline_ms=2**32 - 1,
    )
    valid = validate(request, MODEL)
    assert valid.sampling.seed == 2**64 - 1
    assert valid.sampling == sampling
    assert (valid.n, valid.logprobs, valid.prompt_logprobs) == (16, 20, 0)


def test_the_models_own_end_tokens_stop_unless_they_are_ignored() -> None:
    assert validate(a_request(stop_token_ids=[7]), MODEL).stop_token_ids == (7, 2)
    assert validate(a_request(stop_token_ids=[7], ignore_eos=True), MODEL).stop_token_ids == (7,)


def test_more_tokens_than_the_context_are_refused_before_each_is_looked_at() -> None:
    ids = [MODEL.vocabulary_tokens] * MODEL.context_tokens
    with pytest.raises(InvalidRequest) as refused:
        validate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids)), MODEL)
    assert (refused.value.field, refused.value.reason) == ("input", "PROMPT_TOO_LONG")


def test_the_digest_ignores_the_id_and_nothing_else() -> None:
    request = a_request(request_id="a", stop=["x"], sampling=pb.Sampling(temperature=0.5, logit_bias={1: 1, 2: 2}))
    same = a_request(request_id="b", stop=["x"], sampling=pb.Sampling(temperature=0.5, logit_bias={2: 2, 1: 1}))
    assert digest(request) == digest(same)
    assert digest(pb.GenerateRequest.FromString(request.SerializeToString())) == digest(request)
    for fields in ({"prompt_logprobs": 0}, {"logprobs": 0}, {"n": 2}, {"sampling": pb.Sampling(logit_bias={1: 1})}):
        assert digest(a_request(**fields)) != digest(a_request())
    assert digest(a_request(max_tokens=5)) != digest(a_request(max_tokens=6))
    assert digest(a_request(sampling=pb.Sampling(temperature=1))) != digest(a_request())


@given(st.text(max_size=200))
def test_only_ids_of_the_allowed_characters_are_taken(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-")
    if 1 <= len(text) <= 128 and set(text) <= allowed:
        assert check_request_id(text) == text
    else:
        with pytest.raises(InvalidRequest):
            check_request_id(text)


def test_counting_takes_the_same_inputs() -> None:
    assert encodable(pb.CountTokensRequest(prompt="x")).prompt == "x"
    with pytest.raises(InvalidRequest):
        encodable(pb.CountTokensRequest())
    with pytest.raises(InvalidRequest):
        encodable(pb.CountTokensRequest(chat=a_chat("nobody")))


def test_what_a_client_holds_is_taken_by_choice() -> None:
    request = pb.AttachRequest(
        request_id="a",
        from_index=3,
        held_token_ids=[8, 9],
        points=[pb.ResumePoint(choice=2, from_index=1, held_token_ids=[5])],
    )
    assert held_by_client(request, MODEL) == (Held(3, (8, 9)), NOTHING, Held(1, (5,)))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.AttachRequest(from_index=1, held_token_ids=[1, 2]), "held_token_ids"),
        (pb.AttachRequest(from_index=101), "from_index"),
        (pb.AttachRequest(from_index=2**32 - 1), "from_index"),
        (pb.AttachRequest(from_index=1, held_token_ids=[500]), "held_token_ids[0]"),
        (pb.AttachRequest(points=[pb.ResumePoint(choice=0)]), "points[0].choice"),
        (pb.AttachRequest(points=[pb.ResumePoint(choice=16)]), "points[0].choice"),
        (pb.AttachRequest(points=[pb.ResumePoint(choice=1), pb.ResumePoint(choice=1)]), "points[1].choice"),
    ],
)
def test_a_client_cannot_hold_what_there_cannot_be(request_: pb.AttachRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        held_by_client(request_, MODEL)
    assert caught.value.field == field


def test_a_caller_may_state_a_tenant_that_can_be_one() -> None:
    assert stated_tenant_of([]) is None
    assert stated_tenant_of([("x-shoal-tenant", "acme")]) == "acme"
    for bad in ("", "a/b", "x" * 65, "a b"):
        with pytest.raises(InvalidRequest):
            stated_tenant_of([("x-shoal-tenant", bad)])


def test_tenants_have_caches_of_their_own() -> None:
    assert cache_salt(DEFAULT_TENANT) == cache_salt(DEFAULT_TENANT)
    assert cache_salt(DEFAULT_TENANT) != cache_salt(TenantId("acme"))


def test_only_well_formed_trace_contexts_are_carried() -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    assert traceparent_of([("traceparent", trace)]) == trace
    assert traceparent_of([("traceparent", "nonsense\n")]) == ""


@pytest.mark.parametrize(
    ("value", "token"),
    [("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("abc", ""), ("Basic abc", ""), ("Bearer", ""), ("", "")],
)
def test_a_bearer_token_is_what_follows_its_word(value: str, token: str) -> None:
    assert bearer_of([("other", "x"), ("authorization", value)]) == token
