"""The tokenizer as other services see it: over gRPC, as a process of its own."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gen.shoal.fleet.v1 import tokenizer_pb2_grpc
from gen.shoal.fleet.v1.tokenizer_pb2 import (
    CheckFormatRequest,
    DecodeRequest,
    DescribeRequest,
    EncodeAllRequest,
    EncodeRequest,
    EncodeResponse,
    SpellRequest,
)
from gen.shoal.inference.v1.inference_pb2 import Chat, ChatMessage, ResponseFormat
from services.common import rpc
from services.common.ending import UNFIT_STATUS
from services.common.errors import InvalidRequest, from_rpc, from_status
from tests.unit.eventually import eventually

NAME = "shoal.fleet.v1.TokenizerService"
REFERENCE = Path(__file__).parents[1] / "reference" / "smollm2_greedy.jsonl"

if TYPE_CHECKING:
    Stub = tokenizer_pb2_grpc.TokenizerServiceAsyncStub
    Call = grpc.aio.UnaryUnaryCall[Any, Any]


@dataclass(frozen=True)
class Service:
    """A running tokenizer."""

    process: "subprocess.Popen[str]"
    address: str

    def pool_pids(self) -> set[int]:
        children = psutil.Process(self.process.pid).children()
        return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}


def start(*flags: str) -> Service:
    command = [sys.executable, "-m", "services.tokenizer", "--log-level", "ERROR", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready == {"kind": "tokenizer", "address": ready["address"], "pid": process.pid}
    return Service(process, ready["address"])


def stop(service: Service) -> int:
    service.process.send_signal(signal.SIGTERM)
    status = service.process.wait(60)
    assert service.process.stdout is not None
    service.process.stdout.close()
    return status


def cpu_seconds(pids: set[int]) -> float:
    return sum(psutil.Process(pid).cpu_times().user for pid in pids)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    started = start("--max-input-bytes", "100000")
    yield started
    assert stop(started) == 0


@pytest.fixture
async def channel(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    async with rpc.channel(service.address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> "Stub":
    return tokenizer_pb2_grpc.TokenizerServiceStub(channel)


async def refusal(call: "Call") -> InvalidRequest:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc(caught.value)
    assert isinstance(error, InvalidRequest), error
    return error


async def test_the_reference_chats_and_prompts_are_encoded_and_decoded(stub: "Stub") -> None:
    for line in REFERENCE.read_text().splitlines():
        case = json.loads(line)
        if case["kind"] == "chat":
            request = EncodeRequest(chat=Chat(messages=[ChatMessage(**message) for message in case["messages"]]))
        else:
            request = EncodeRequest(prompt=case["prompt"])
        assert list((await stub.Encode(request)).token_ids) == case["prompt_token_ids"], case["name"]
        decoded = await stub.Decode(DecodeRequest(token_ids=case["output_token_ids"], ended=True))
        assert decoded.text == case["text"], case["name"]


async def test_the_models_facts_are_described(stub: "Stub") -> None:
    facts = await stub.Describe(DescribeRequest())
    assert (facts.model, facts.context_tokens, facts.vocabulary_tokens) == ("smollm2-135m-instruct", 8192, 49152)
    assert list(facts.end_token_ids) == [2]


async def test_single_tokens_are_spelled(stub: "Stub") -> None:
    tokens = (await stub.Encode(EncodeRequest(prompt="naïve 😀"))).token_ids
    assert b"".join((await stub.Spell(SpellRequest(token_ids=tokens))).spellings).decode() == "naïve 😀"
    assert (await refusal(stub.Spell(SpellRequest(token_ids=[1 << 31])))).field == "token_ids"


async def test_inputs_that_come_together_are_answered_as_if_each_had_come_alone(stub: "Stub") -> None:
    inputs = [EncodeRequest(prompt=f"text {number}") for number in range(64)]
    asked = [*inputs[:63], EncodeRequest(chat=Chat())]
    response = await stub.EncodeAll(EncodeAllRequest(inputs=[each.SerializeToString() for each in asked]))
    for each, result in zip(inputs[:63], response.results, strict=False):
        assert EncodeResponse.FromString(result.response) == await stub.Encode(each)
    refused = from_status(response.results[63].error)
    assert isinstance(refused, InvalidRequest)
    alone = await refusal(stub.Encode(EncodeRequest(chat=Chat())))
    assert (refused.message, refused.reason, refused.field) == (alone.message, alone.reason, alone.field)


async def test_too_many_inputs_or_too_long_ones_do_not_come_together(stub: "Stub") -> None:
    for inputs in ([b""] * 65, [b"", b"x" * 4_097]):
        assert (await refusal(stub.EncodeAll(EncodeAllRequest(inputs=inputs)))).field == "inputs"


async def test_an_empty_prompt_is_no_error(stub: "Stub") -> None:
    assert not (await stub.Encode(EncodeRequest(prompt=""))).token_ids


async def test_invalid_inputs_are_refused_with_the_field(stub: "Stub") -> None:
    assert (await refusal(stub.Encode(EncodeRequest()))).field == "input"
    assert (await refusal(stub.Encode(EncodeRequest(chat=Chat())))).field == "chat.messages"
    assert (await refusal(stub.Decode(DecodeRequest(token_ids=[1], from_index=2)))).field == "from_index"
    assert (await refusal(stub.Decode(DecodeRequest(token_ids=[1 << 31])))).field == "token_ids"


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        (ResponseFormat(json_schema="{"), "json_schema: is not JSON: Expecting property name"),
        (ResponseFormat(json_schema="[1]"), "json_schema: is a JSON list; expected an object"),
        (ResponseFormat(json_schema='{"minimum": 1e999}'), "json_schema: is not JSON"),
        (ResponseFormat(json_schema='{"type": "strin"}'), "json_schema: Invalid type: strin"),
        (ResponseFormat(json_schema='{"minLength": -1}'), "minLength"),
        (ResponseFormat(json_schema='{"type": "array", "uniqueItems": true}'), "json_schema: Unimplemented keys: "),
        (ResponseFormat(json_schema='{"type": "array", "uniqueItems": true}'), '"uniqueItems"'),
        (ResponseFormat(json_schema='{"x-guidance": {"lenient": true}}'), "x-guidance"),
        (ResponseFormat(json_schema='{"type": "string", "format": "nosuch"}'), "Unknown format: nosuch"),
        (ResponseFormat(json_schema='{"$ref": "http://localhost/a"}'), "does not fetch"),
        (ResponseFormat(json_schema='{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum (5) is greater"),
        (ResponseFormat(json_schema='{"allOf": [{"type": "string"}, {"type": "null"}]}'), "Unsatisfiable schema"),
        (ResponseFormat(json_schema='{"$ref": "#"}'), "json_schema: fits no text"),
        (ResponseFormat(json_schema='{"items":' * 65 + "{}" + "}" * 65), "nested more than 64 levels"),
        (ResponseFormat(json_schema='{"items":' * 9_000), "json_schema: is not JSON"),
        (ResponseFormat(regex="[0-9"), "regex: unclosed character class"),
        (ResponseFormat(regex="(?=a)b"), "regex: look-around"),
        (ResponseFormat(regex=r"(a)\1"), "regex: backreferences are not supported"),
        (ResponseFormat(regex="a\\"), "regex: ends in a backslash"),
        (ResponseFormat(regex=r"[^\s\S]"), "regex: fits no text"),
        (ResponseFormat(regex="a{0}"), "regex: fits the empty text only"),
        (ResponseFormat(), "give one of"),
    ],
)
async def test_a_form_that_cannot_be_kept_is_refused_with_the_field_and_the_reason(
    stub: "Stub", form: ResponseFormat, problem: str
) -> None:
    error = await refusal(stub.CheckFormat(CheckFormatRequest(response_format=form)))
    assert error.field == f"response_format.{form.WhichOneof('format') or 'format'}"
    assert problem in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize(
    "form",
    [
        ResponseFormat(json_object=True),
        ResponseFormat(json_schema='{"type": "object", "properties": {"a": {"$ref": "#"}}, "description": "a tree"}'),
        ResponseFormat(regex=r"^a/b\/[0-9]+$"),
        ResponseFormat(choices=ResponseFormat.Choices(texts=['\x00/\n\\"', "é😀", *map(str, range(1_000))])),
    ],
)
async def test_a_form_that_can_be_kept_is_taken(stub: "Stub", form: ResponseFormat) -> None:
    await stub.CheckFormat(CheckFormatRequest(response_format=form))


async def test_an_input_over_the_limit_is_refused_with_the_limit(stub: "Stub") -> None:
    error = await refusal(stub.Encode(EncodeRequest(prompt="a" * 100_001)))
    assert error.reason == "INPUT_TOO_LONG"
    assert "100000" in error.message


async def test_an_unknown_role_does_not_crash_the_template(stub: "Stub") -> None:
    request = EncodeRequest(chat=Chat(messages=[ChatMessage(role="\x00{{ 1/0 }}", content="{% endfor %}")]))
    assert (await stub.Encode(request)).token_ids


async def test_bytes_that_are_no_message_are_refused(channel: grpc.aio.Channel) -> None:
    call: Any = channel.unary_unary(f"/{NAME}/Encode", bytes, bytes)
    await refusal(call(b"\xff\xff"))


async def test_a_killed_pool_process_is_replaced_and_no_call_fails(service: Service, stub: "Stub") -> None:
    before = service.pool_pids()
    calls = [asyncio.ensure_future(stub.Encode(EncodeRequest(prompt=f"{n} {'x ' * 20000}"))) for n in range(20)]
    await asyncio.sleep(0.05)
    os.kill(min(before), signal.SIGKILL)
    assert all(len(answer.token_ids) > 20000 for answer in await asyncio.gather(*calls))
    await eventually(lambda: len(service.pool_pids()) == len(before))
    assert min(before) not in service.pool_pids()


async def test_short_inputs_wait_for_no_process_of_the_pool(service: Service, stub: "Stub") -> None:
    stopped = service.pool_pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        short = EncodeRequest(prompt="The sea")
        alone = await stub.Encode(short, timeout=10)
        together = await stub.EncodeAll(EncodeAllRequest(inputs=[short.SerializeToString()] * 64), timeout=10)
        assert [EncodeResponse.FromString(result.response) for result in together.results] == [alone] * 64
        waiting = asyncio.ensure_future(stub.Encode(EncodeRequest(prompt="The sea " * 200)))
        assert await stub.Encode(short, timeout=10) == alone
        assert not waiting.done()
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert len((await waiting).token_ids) > 200


async def test_health_and_reflection_are_served(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", NAME):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    async for response in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests)):
        assert NAME in {service.name for service in response.list_services_response.service}


async def test_the_front_stays_small(service: Service, stub: "Stub") -> None:
    await stub.Encode(EncodeRequest(prompt="The quick brown fox. " * 4000))
    assert psutil.Process(service.process.pid).memory_info().rss < 150 << 20


async def test_sigterm_lets_open_calls_end_and_leaves_no_process() -> None:
    service = start("--stop-grace-ms", "60000")
    pool_pids = service.pool_pids()
    async with rpc.channel(service.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        idle_s = cpu_seconds(pool_pids)
        call = asyncio.ensure_future(stub.Encode(EncodeRequest(prompt="abcdefgh" * (1 << 18))))
        # A call that the service has not read yet may be refused; this one is being worked on.
        await eventually(lambda: cpu_seconds(pool_pids) > idle_s + 0.05)
        status = await asyncio.to_thread(stop, service)
        assert len((await call).token_ids) > 100_000
    assert status == 0
    assert not any(is_alive(pid) for pid in pool_pids)


async def test_killing_the_front_leaves_no_process() -> None:
    service = start()
    pool_pids = service.pool_pids()
    service.process.kill()
    service.process.wait(60)
    assert service.process.stdout is not None
    service.process.stdout.close()
    await eventually(lambda: not any(is_alive(pid) for pid in pool_pids))


def test_a_model_that_cannot_be_read_ends_the_service_with_a_line_that_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.tokenizer", "--model-path", str(tmp_path / "absent.gguf")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == UNFIT_STATUS
    assert ended.stdout == ""
    assert "absent.gguf: is not there" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("flags", [["--processes", "-1"], ["--max-input-bytes", "many"]])
def test_a_wrong_option_is_named(flags: list[str]) -> None:
    command = [sys.executable, "-m", "services.tokenizer", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == UNFIT_STATUS
    assert flags[0] in ended.stderr
