"""An answer has the form that was asked for: whatever the model would say, whoever dies, and at nobody else's cost."""

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import jsonschema
import pytest

import shoal
from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from tests.fleet.conftest import Fleet

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "role": {"enum": ["captain", "cook", "sailor"]},
        "age": {"type": "integer", "minimum": 16, "maximum": 99},
        "weight": {"type": "number", "exclusiveMinimum": 30, "maximum": 200},
        "ship": {
            "type": "object",
            "properties": {"masts": {"enum": [1, 2, 3]}, "afloat": {"type": "boolean"}},
            "required": ["masts", "afloat"],
            "additionalProperties": False,
        },
        "ports": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "role", "age", "weight", "ship", "ports"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Describe a person on a ship as JSON."}]


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    return start("--workers", "2")


def answer(client: shoal.Client, form: Mapping[str, Any], **options: Any) -> str:
    stream = client.generate(messages=QUESTION, response_format=form, **{"max_tokens": 400, **options})
    text = stream.read()
    assert stream.finished is not None
    assert stream.finished.reason is shoal.FinishReason.STOP, text
    return text


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1, "seed": 1}, {"temperature": 2, "seed": 2}])
def test_an_answer_under_a_schema_fits_it(fleet: Fleet, how: dict[str, Any]) -> None:
    with fleet.client() as client:
        jsonschema.validate(json.loads(answer(client, {"json_schema": SCHEMA}, **how)), SCHEMA)


def test_any_object_is_a_json_object_or_says_that_it_was_cut(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = client.generate(
            messages=QUESTION, response_format={"json_object": True}, temperature=0, max_tokens=300
        )
        text = stream.read()
    assert stream.finished is not None
    if stream.finished.reason is shoal.FinishReason.STOP:
        assert isinstance(json.loads(text), dict)
    else:
        assert (stream.finished.reason, len(stream.token_ids)) == (shoal.FinishReason.LENGTH, 300)
        assert text.lstrip().startswith("{")


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_a_regex_is_matched_as_a_whole(fleet: Fleet, how: dict[str, Any]) -> None:
    regex = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]"
    with fleet.client() as client:
        assert re.fullmatch(regex, answer(client, {"regex": regex}, **how))


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.5, "seed": 4}, {"ignore_eos": True}])
def test_one_of_some_choices_is_given(fleet: Fleet, how: dict[str, Any]) -> None:
    choices = ["starboard", "port", "port side", "größer"]
    with fleet.client() as client:
        assert answer(client, {"choices": choices}, **how) in choices


def test_each_choice_has_the_form_and_goes_its_own_way(fleet: Fleet) -> None:
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(**message) for message in QUESTION]),
        response_format=pb.ResponseFormat(json_schema=json.dumps(SCHEMA)),
        sampling=pb.Sampling(seed=5),
        max_tokens=400,
        n=2,
    )
    texts = {0: "", 1: ""}
    with grpc.insecure_channel(fleet.gateways[0]) as channel:
        for response in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request):
            if response.HasField("delta"):
                texts[response.delta.choice] += response.delta.text
    for text in texts.values():
        jsonschema.validate(json.loads(text), SCHEMA)
    assert texts[0] != texts[1]


def test_an_answer_goes_on_to_a_whole_document_when_its_worker_dies(fleet: Fleet) -> None:
    with fleet.client() as client:
        undisturbed = answer(client, {"json_schema": SCHEMA}, temperature=0.8, seed=7)
        stream = client.generate(
            messages=QUESTION, response_format={"json_schema": SCHEMA}, temperature=0.8, seed=7, max_tokens=400,
            request_id="moved",
        )  # fmt: skip
        deltas = iter(stream)
        pieces = [next(deltas).text for _ in range(4)]
        num_lines = len(fleet.lines)
        # Both, as the one that has it is not known from outside.
        for worker in fleet.of_kind("worker"):
            os.kill(worker.pid, signal.SIGKILL)
        text = "".join([*pieces, *(delta.text for delta in deltas)])
        jsonschema.validate(json.loads(text), SCHEMA)
        assert text == undisturbed
        assert client.get_request("moved").attempts > 1
    fleet.await_lines(num_lines + 1)


def test_free_answers_beside_constrained_ones_are_the_reference(
    fleet: Fleet, greedy_cases: list[dict[str, Any]]
) -> None:
    cases = [case for case in greedy_cases if case["kind"] == "chat" and case["max_tokens"] <= 64][:4]
    with fleet.client() as client:
        constrained = [
            client.generate(messages=QUESTION, response_format={"json_schema": SCHEMA}, seed=seed, max_tokens=400)
            for seed in range(4)
        ]
        free = [client.generate(messages=c["messages"], temperature=0, max_tokens=c["max_tokens"]) for c in cases]
        for stream, case in zip(free, cases, strict=True):
            stream.read()
            assert list(stream.token_ids) == case["output_token_ids"]
        for stream in constrained:
            jsonschema.validate(json.loads(stream.read()), SCHEMA)


@pytest.mark.parametrize(
    ("form", "field", "reason"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema", "greater than maximum"),
        ({"json_schema": "{"}, "json_schema", "is not JSON"),
        ({"json_schema": " " * 70_000}, "json_schema", "at most 65536|1 to 65536"),
        ({"regex": "[0-9"}, "regex", "unclosed character class"),
        ({"choices": []}, "choices.texts", "1 to 1024"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_with_the_reason(
    fleet: Fleet, form: dict[str, Any], field: str, reason: str
) -> None:
    with fleet.client() as client:
        with pytest.raises(shoal.InvalidRequest, match=reason) as caught:
            client.generate("Hi", response_format=form, request_id="refused").read()
        assert caught.value.field == f"response_format.{field}"
        with pytest.raises(shoal.NotFound):
            client.get_request("refused")


def test_the_command_takes_a_schema_and_a_regex(fleet: Fleet, tmp_path: Any) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    schema = fleet.command("generate", "--chat", "--json-schema", str(tmp_path / "schema.json"), "A sailor, please.")
    assert schema.returncode == 0, schema.stderr
    jsonschema.validate(json.loads(schema.stdout), SCHEMA)
    regex = fleet.command("generate", "--regex", "[0-9]{4}", "The year is ")
    assert re.fullmatch(r"[0-9]{4}\n", regex.stdout)
    assert "cannot read" in fleet.command("generate", "--json-schema", str(tmp_path / "none.json"), "x").stderr
