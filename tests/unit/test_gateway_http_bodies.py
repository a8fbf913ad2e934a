"""An HTTP body is the request that its user means, or is refused with the name that the user gave the field."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import fields as fields_of

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common import errors
from services.common.errors import InvalidRequest, ShoalError
from services.gateway.http import body
from services.gateway.http.chat_fields import ChatFields, Message
from services.gateway.http.completion_fields import CompletionFields
from services.gateway.http.endpoints import CHAT, COMPLETIONS
from services.gateway.http.errors import TOLD, error_response, renamed
from services.gateway.http.fields import JsonSchema, StreamOptions

DOCUMENT = Path(__file__).parents[2] / "docs" / "http.md"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> pb.GenerateRequest:
    document = json.dumps({"messages": HELLO, **fields}).encode()
    return CHAT.to_request(body.decode(document, CHAT.decoder))


def completion(**fields: Any) -> pb.GenerateRequest:
    document = json.dumps({"prompt": "hello", **fields}).encode()
    return COMPLETIONS.to_request(body.decode(document, COMPLETIONS.decoder))


def refused(document: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        CHAT.to_request(body.decode(document, CHAT.decoder))
    return caught.value


@pytest.mark.parametrize(
    ("fields", "request_"),
    [
        ({"temperature": 0, "top_p": 0.5}, {"sampling": {"temperature": 0, "top_p": 0.5}}),
        ({"presence_penalty": 1}, {"sampling": {"presence_penalty": 1}}),
        ({"frequency_penalty": -1}, {"sampling": {"frequency_penalty": -1}}),
        ({"logit_bias": {"5": -100}}, {"sampling": {"logit_bias": {5: -100}}}),
        ({"top_k": 5, "min_p": 0.5}, {"sampling": {"top_k": 5, "min_p": 0.5}}),
        ({"top_k": -1}, {"sampling": {}}),
        ({"repetition_penalty": 1.5}, {"sampling": {"repetition_penalty": 1.5}}),
        ({"seed": 7}, {"sampling": {"seed": 7}}),
        ({"seed": -1}, {"sampling": {"seed": 2**64 - 1}}),
        ({"n": 3}, {"n": 3}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"ignore_eos": True, "stop_token_ids": [1, 2]}, {"ignore_eos": True, "stop_token_ids": [1, 2]}),
        ({"priority": "interactive"}, {"priority": pb.PRIORITY_INTERACTIVE}),
        ({"deadline_ms": 5, "time_to_first_token_ms": 6}, {"deadline_ms": 5, "time_to_first_token_ms": 6}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"json_object": True}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": [1]}}}},
            {"response_format": {"json_schema": '{"a": [1]}'}},
        ),
        ({"user": "ada", "metadata": {"a": "b"}, "stream": True, "stream_options": {"include_usage": True}}, {}),
        ({"stop": None, "n": None, "seed": None, "logit_bias": None, "model": None}, {}),
    ],
)  # fmt: skip
def test_a_field_of_both_endpoints_has_its_place_in_the_request(
    fields: dict[str, Any], request_: dict[str, Any]
) -> None:
    # Sampling is always stated, so that a field that is null makes the same request as one that is absent.
    expected = {"sampling": {}, **request_}
    messages = pb.Chat(messages=[pb.ChatMessage(role="user", content="hello")])
    assert chat(max_tokens=9, **fields) == pb.GenerateRequest(chat=messages, max_tokens=9, **expected)
    assert completion(max_tokens=9, **fields) == pb.GenerateRequest(prompt="hello", max_tokens=9, **expected)


def test_a_message_of_text_parts_is_one_text_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    assert [(each.role, each.content) for each in request.chat.messages] == [("system", "be kind"), ("user", "a\nb")]


def test_an_answer_that_a_client_sends_back_is_a_message() -> None:
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "function_call": None}
    assert chat(messages=[*HELLO, answer]).chat.messages[1] == pb.ChatMessage(role="assistant", content="hi")


def test_max_tokens_has_two_names_in_a_chat_and_a_default_in_a_completion() -> None:
    assert not chat().HasField("max_tokens")
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=6).max_tokens == 6
    assert chat(max_tokens=6, max_completion_tokens=6).max_tokens == 6
    with pytest.raises(InvalidRequest, match="max_completion_tokens"):
        chat(max_tokens=5, max_completion_tokens=6)
    assert completion().max_tokens == 16


def test_logprobs_are_a_switch_and_a_number_in_a_chat_and_a_number_in_a_completion() -> None:
    assert not chat(logprobs=False).HasField("logprobs")
    assert chat(logprobs=True).HasField("logprobs")
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    with pytest.raises(InvalidRequest, match="logprobs is not true"):
        chat(top_logprobs=5)
    assert not completion().HasField("logprobs")
    assert completion(logprobs=0).HasField("logprobs")
    assert completion(logprobs=5).logprobs == 5


def test_a_prompt_is_a_text_or_token_ids_and_one_of_a_list() -> None:
    assert completion(prompt=["a"]).prompt == "a"
    assert list(completion(prompt=[5, 6]).token_ids.ids) == [5, 6]
    assert completion(prompt=[]).WhichOneof("input") == "token_ids", "none: the core says what is missing"
    for several in (["a", "b"], ["a", 5]):
        with pytest.raises(InvalidRequest, match="requests of their own") as caught:
            completion(prompt=several)
        assert caught.value.field == "prompt"


def test_what_a_completion_cannot_do_is_refused_and_what_is_no_demand_is_taken() -> None:
    completion(echo=False, best_of=1, suffix=None)
    completion(n=2, best_of=2)
    for fields in ({"best_of": 2}, {"suffix": "x"}, {"stream": True, "echo": True, "logprobs": 1}):
        with pytest.raises(InvalidRequest, match="not supported") as caught:
            completion(**fields)
        assert caught.value.field in fields


def test_an_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    assert completion(echo=True, logprobs=3).prompt_logprobs == 3
    assert not completion(echo=True).HasField("prompt_logprobs")
    assert not completion(logprobs=3).HasField("prompt_logprobs")


@pytest.mark.parametrize(
    ("document", "field", "reason"),
    [
        (b'{"messages": [], "foo": 1}', "foo", "UNKNOWN_FIELD"),
        (b'{"messages": [{"role": "user", "content": "a", "foo": 1}]}', "messages[0].foo", "UNKNOWN_FIELD"),
        (b'{"messages": [], "stream_options": {"foo": 1}}', "stream_options.foo", "UNKNOWN_FIELD"),
        (b"{}", "messages", "MISSING_FIELD"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content", "MISSING_FIELD"),
        (b'{"messages": [], "tools": [{}]}', "tools", "NOT_SUPPORTED"),
        (b'{"messages": [], "temperature": "hot"}', "temperature", "INVALID_FIELD"),
        (b'{"messages": [], "max_tokens": -1}', "max_tokens", "INVALID_FIELD"),
        (b'{"messages": [], "max_tokens": 1.5}', "max_tokens", "INVALID_FIELD"),
        (b'{"messages": [], "max_tokens": 4294967296}', "max_tokens", "INVALID_FIELD"),
        (b'{"messages": [], "logit_bias": {"-1": 1}}', "logit_bias", "INVALID_FIELD"),
        (b'{"messages": [], "priority": "now"}', "priority", "INVALID_FIELD"),
        (b'{"messages": [], "response_format": {"type": "xml"}}', "response_format.type", "INVALID_FIELD"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
            "messages[0].content[0].type",
            "INVALID_FIELD",
        ),
        (b"[]", "", "INVALID_FIELD"),
        (b"", "", "MALFORMED_JSON"),
        (b"{", "", "MALFORMED_JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "", "MALFORMED_JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "", "MALFORMED_JSON"),
        (b'{"messages": [], "temperature": NaN}', "", "MALFORMED_JSON"),
        (
            b'{"messages": [], "response_format": {"type": "json_schema", "json_schema": {"schema": '
            + b"[" * 100_000 + b"]" * 100_000 + b"}}}",
            "",
            "MALFORMED_JSON",
        ),
        (
            b'{"messages": [], "response_format": {"type": "json_schema", "json_schema": {"schema": "\xff"}}}',
            "response_format.json_schema.schema",
            "MALFORMED_JSON",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(document: bytes, field: str, reason: str) -> None:
    error = refused(document)
    assert (error.field, error.reason) == (field, reason)
    assert not field or field in error.message


def test_lists_that_would_hold_up_the_gateway_are_refused_by_their_length() -> None:
    assert len(completion(prompt=[1] * 131_072).token_ids.ids) == 131_072
    for fields, field in (
        ({"prompt": [1] * 131_073}, "prompt"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": {str(token): 1 for token in range(1_025)}}, "logit_bias"),
    ):
        with pytest.raises(InvalidRequest, match="length") as caught:
            completion(**fields)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="length <= 1024"):
        chat(messages=HELLO * 1_025)


def test_a_long_unknown_name_is_cut() -> None:
    assert len(refused(json.dumps({"messages": [], "x" * 100_000: 1}).encode()).message) < 300


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("sampling.temperature", "temperature"),
        ("chat.messages[0].role", "messages[0].role"),
        ("chat.messages", "messages"),
        ("input", "messages"),
        ("request_id", "Idempotency-Key"),
        ("max_tokens", "max_tokens"),
        ("response_format.json_schema", "response_format.json_schema.schema"),
        ("response_format.json_schema.name", "response_format.json_schema.name"),
        ("", ""),
    ],
)
def test_the_cores_errors_name_fields_as_the_body_does(field: str, name: str) -> None:
    told = renamed(InvalidRequest(f"{field} is 5; expected 4", field=field, reason="R", retry_after_ms=7), CHAT.names)
    assert isinstance(told, InvalidRequest)
    assert (told.field, told.message, told.reason, told.retry_after_ms) == (name, f"{name} is 5; expected 4", "R", 7)
    assert renamed(InvalidRequest("", field="token_ids.ids[3]"), COMPLETIONS.names).field == "prompt[3]"


def test_every_error_has_a_status_and_says_when_to_come_back() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShoalError)}
    assert set(TOLD) == kinds - {ShoalError}
    for kind in TOLD:
        assert error_response(kind("no")).headers["x-should-retry"] == "false"
        later = error_response(kind("no", retry_after_ms=1_001), "id")
        assert (later.headers["Retry-After"], later.headers["x-should-retry"]) == ("2", "true")
        assert later.headers["x-request-id"] == "id"


@pytest.mark.parametrize("body_type", [ChatFields, CompletionFields, Message, StreamOptions, JsonSchema])
def test_every_field_is_documented(body_type: type[Struct]) -> None:
    document = DOCUMENT.read_text()
    assert not [field.name for field in fields_of(body_type) if f"`{field.name}`" not in document]
