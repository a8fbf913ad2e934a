"""OpenAI's API over HTTP: the same requests as over gRPC, told in OpenAI's form."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import pytest
from aiohttp import ClientResponse

from gen.shoal.fleet.v1 import delivery_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.record.record import Record
from services.common.record.states import RequestState
from services.gateway.http import outgoing
from tests.contract.gateway_fleet import (
    CONTEXT_TOKENS,
    WITHIN_S,
    Fleet,
    Opened,
    RunningGateway,
    frame,
    tokens_of,
)
from tests.contract.http_answers import CHAT, COMPLETIONS, Events, HttpUser, an_http_user

BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


@pytest.fixture
async def user() -> AsyncIterator[HttpUser]:
    async for user in an_http_user():
        yield user


async def streaming(
    fleet: Fleet, gateway: RunningGateway, user: HttpUser, path: str = CHAT, **fields: Any
) -> tuple[Events, Opened]:
    """A stream whose request a worker has opened."""
    response = await user.post(gateway.addresses, path, stream=True, **fields)
    return Events(response), await fleet.opened(gateway, fleet.key(response.headers["x-request-id"]))


async def asking(
    fleet: Fleet, gateway: RunningGateway, user: HttpUser, path: str = CHAT, **fields: Any
) -> tuple["asyncio.Task[ClientResponse]", Opened]:
    """A call for one document whose request a worker has opened."""
    call = asyncio.create_task(user.post(gateway.addresses, path, key="a", **fields))
    await fleet.stored(fleet.key("a"))
    return call, await fleet.opened(gateway, fleet.key("a"))


async def error_of(response: ClientResponse) -> dict[str, Any]:
    document = await response.json()
    assert list(document) == ["error"]
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def payload(record: Record) -> request_pb2.RequestPayload:
    return request_pb2.RequestPayload.FromString(record.payload)


# Answers


async def test_a_chat_is_streamed_in_openais_events(fleet: Fleet, user: HttpUser) -> None:
    events, opened = await streaming(fleet, await fleet.gateway(), user, max_tokens=9, temperature=0)
    asked = payload(await fleet.record(opened.key))
    assert list(asked.prompt_token_ids) == tokens_of("user:hi")
    assert (asked.max_tokens, asked.sampling.temperature) == (9, 0)
    await opened.send(0, "ab")
    await events.until_text("ab")
    await opened.send(2, "c")
    await opened.end(3)
    await events.end()
    assert (events.text, events.done, events.error) == ("abc", True, None)
    first, *_, last = events.chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    record = await fleet.record(opened.key)
    for chunk in events.chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == f"chatcmpl-{opened.request_id}"
        assert (chunk["created"], chunk["model"]) == (record.accepted_at_ms // 1000, fleet.pool)


async def test_a_completion_is_streamed_with_its_usage(fleet: Fleet, user: HttpUser) -> None:
    events, opened = await streaming(
        fleet, await fleet.gateway(), user, COMPLETIONS, prompt=[5, 6], stream_options={"include_usage": True}
    )
    assert list(payload(await fleet.record(opened.key)).prompt_token_ids) == [5, 6]
    await opened.send(0, "abc")
    await opened.end(3)
    await events.end()
    assert (events.text, events.done) == ("abc", True)
    assert events.chunks[-1]["choices"] == []
    assert events.chunks[-1]["usage"]["completion_tokens"] == 3
    assert {chunk["usage"] for chunk in events.chunks[:-1]} == {None}


@BOTH
async def test_one_document_has_the_whole_answer(fleet: Fleet, user: HttpUser, path: str) -> None:
    call, opened = await asking(fleet, await fleet.gateway(), user, path)
    await opened.send(0, "ab")
    await opened.send(2, "c")
    await opened.end(3)
    response = await call
    assert (response.status, response.content_type) == (200, "application/json")
    assert response.headers["x-request-id"] == "a"
    document = await response.json()
    (choice,) = document["choices"]
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == "abc"
    assert choice["finish_reason"] == "stop"
    assert document["id"].endswith("-a")
    assert document["usage"]["total_tokens"] == 8


async def test_a_tenant_and_a_trace_come_by_header(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    headers = {"X-Shoal-Tenant": "acme", "Traceparent": trace, "Idempotency-Key": "a"}
    async with await user.send(
        gateway.addresses, "POST", COMPLETIONS, json={"prompt": "hi", "stream": True}, headers=headers
    ):
        asked = payload(await fleet.record(fleet.key("a", "acme")))
    assert (asked.tenant, asked.traceparent) == ("acme", trace)


async def test_models_are_listed_and_told_one_by_one(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    listed = await (await user.get(gateway.addresses, "/v1/models")).json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == (fleet.pool, "model", CONTEXT_TOKENS)
    assert await (await user.get(gateway.addresses, f"/v1/models/{fleet.pool}")).json() == model
    unknown = await user.get(gateway.addresses, "/v1/models/some/body")
    assert unknown.status == 404
    assert (await error_of(unknown))["code"] == "model_not_found"


# Refusals


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_field"),
        ({"temperature": "hot"}, "temperature", "invalid_field"),
        ({"max_tokens": 0}, "max_tokens", "invalid_field"),
        ({"max_tokens": CONTEXT_TOKENS - 1}, "max_tokens", "context_length_exceeded"),
        ({"messages": []}, "messages", "invalid_field"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "invalid_field"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT_TOKENS}]}, "messages", "context_length_exceeded"),
        ({"stop": [""]}, "stop[0]", "invalid_field"),
        ({"n": 17}, "n", "invalid_field"),
        ({"colour": "red"}, "colour", "unknown_field"),
        ({"tools": []}, "tools", "not_supported"),
    ],
)
async def test_a_bad_field_is_named_as_the_user_wrote_it_and_nothing_is_stored(
    fleet: Fleet, user: HttpUser, fields: dict[str, Any], param: str, code: str
) -> None:
    gateway = await fleet.gateway()
    response = await user.post(gateway.addresses, CHAT, key="a", **fields)
    error = await error_of(response)
    assert (response.status, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert param in error["message"] or code == "context_length_exceeded"
    assert response.headers["x-should-retry"] == "false"
    assert await fleet.store.read(fleet.key("a")) is None


async def test_bad_tokens_of_a_prompt_are_named(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    response = await user.post(gateway.addresses, COMPLETIONS, prompt=[1, 99_999])
    assert (response.status, (await error_of(response))["param"]) == (400, "prompt[1]")


async def test_another_model_is_not_found(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    response = await user.post(gateway.addresses, CHAT, model="gpt-4")
    error = await error_of(response)
    assert (response.status, error["param"], error["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/v2/models", {}, 404, "unknown_path"),
        ("GET", CHAT, {}, 405, "method_not_allowed"),
        ("POST", CHAT, {"data": b"{", "headers": {"Content-Type": "application/json"}}, 400, "malformed_json"),
        ("POST", CHAT, {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type"),
        (
            "POST", CHAT, {"data": b"{}", "headers": {"Content-Type": "application/json", "Content-Encoding": "br"}},
            415, "unsupported_media_type",
        ),
        ("POST", CHAT, {"json": {"prompt": "x" * 2_000}}, 413, "body_too_large"),
    ],
)  # fmt: skip
async def test_what_http_refuses_is_told_in_the_same_form_and_the_next_request_is_served(
    fleet: Fleet, user: HttpUser, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    gateway = await fleet.gateway(http_max_body_bytes=2_000)
    response = await user.send(gateway.addresses, method, path, **options)
    assert (response.status, (await error_of(response))["code"]) == (status, code)
    assert ("Allow" in response.headers) == (status == 405)
    assert (await user.get(gateway.addresses, "/v1/models")).status == 200


async def test_a_body_without_a_length_is_bounded_too(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(http_max_body_bytes=2_000)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1_000):
            yield b"x" * 100

    headers = {"Content-Type": "application/json"}
    response = await user.send(gateway.addresses, "POST", CHAT, data=endless(), headers=headers)
    assert (response.status, (await error_of(response))["code"]) == (413, "body_too_large")


async def test_bodies_that_are_being_read_are_bounded_together(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(http_max_body_bytes=2_000)
    slow = [await connect(gateway) for _ in range(40)]
    for _, writer in slow:
        writer.write(post(CHAT, {"prompt": "x" * 1_900})[:-10])
    async with asyncio.timeout(WITHIN_S):
        while (response := await user.post(gateway.addresses, COMPLETIONS, prompt="x" * 1_900, n=99)).status == 400:
            await asyncio.sleep(0.01)
    assert (response.status, (await error_of(response))["code"]) == (429, "too_many_bodies")
    assert response.headers["Retry-After"] == "1"
    for _, writer in slow:
        writer.close()
    async with asyncio.timeout(WITHIN_S):
        while (await user.post(gateway.addresses, COMPLETIONS, prompt="x" * 1_900, n=99)).status == 429:
            await asyncio.sleep(0.01)


async def test_bytes_that_are_no_http_are_refused(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    for garbage in (b"\x00\xff\r\n\r\n", chunked(b"zz\r\nxx")):
        reader, writer = await connect(gateway)
        writer.write(garbage)
        async with asyncio.timeout(WITHIN_S):
            assert (await reader.read()).startswith(b"HTTP/1.")
        writer.close()
    assert (await user.get(gateway.addresses, "/v1/models")).status == 200


async def test_too_many_waiting_requests_are_429_and_say_when_to_come_back(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(backlog_limit=1)
    async with await user.post(gateway.addresses, CHAT, stream=True):
        response = await user.post(gateway.addresses, CHAT)
        error = await error_of(response)
    assert (response.status, error["type"], error["code"]) == (429, "rate_limit_error", "backlog_full")
    assert (response.headers["Retry-After"], response.headers["x-should-retry"]) == ("1", "true")


async def test_streams_over_http_and_grpc_are_counted_together(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(max_streams=1)
    call = gateway.generate()
    await call.accepted()
    response = await user.post(gateway.addresses, CHAT, stream=True)
    assert (response.status, (await error_of(response))["code"]) == (429, "too_many_streams")
    call.call.cancel()
    events = await served(user, gateway)
    assert (await gateway.generate().error()).reason == "TOO_MANY_STREAMS"
    events.response.close()
    await served(user, gateway)


async def test_a_fleet_without_tokenizers_is_503(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(tokenizer_timeout_ms=200)
    fleet.tokenizer.refuses = 100
    response = await user.post(gateway.addresses, CHAT)
    assert (response.status, (await error_of(response))["type"]) == (503, "server_error")
    assert response.headers["Retry-After"] == "1"


# Ends


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        (RequestState.EXPIRED, 504, "expired"),
        (RequestState.FAILED, 500, "failed"),
        (RequestState.QUARANTINED, 409, "poisoned"),
    ],
)
async def test_a_bad_end_is_a_status_in_one_document_and_an_event_in_a_stream(
    fleet: Fleet, user: HttpUser, state: RequestState, status: int, code: str
) -> None:
    gateway = await fleet.gateway()
    call, opened = await asking(fleet, gateway, user)
    await fleet.finish(opened.key, opened.attempt, "", state, "because")
    response = await call
    assert (response.status, (await error_of(response))["code"]) == (status, code)
    assert (response.headers["x-request-id"], response.headers["x-should-retry"]) == ("a", "false")
    events, opened = await streaming(fleet, gateway, user)
    await opened.send(0, "ab")
    await fleet.finish(opened.key, opened.attempt, "ab", state, "because")
    await events.end()
    assert events.text == "ab", "what was generated before is kept"
    assert events.error is not None
    assert (events.error["code"], events.done) == (code, False)


async def test_a_cancelled_request_says_so(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    call = asyncio.create_task(user.post(gateway.addresses, CHAT, key="a"))
    await fleet.stored(fleet.key("a"))
    await gateway.stub.Cancel(pb.CancelRequest(request_id="a"))
    assert (await (await call).json())["choices"][0]["finish_reason"] == "cancelled"


# Retries


@BOTH
async def test_a_retry_with_the_same_key_reads_from_the_first_token_and_the_first_call_ends(
    fleet: Fleet, user: HttpUser, path: str
) -> None:
    gateway = await fleet.gateway()
    first, opened = await streaming(fleet, gateway, user, path, key="a")
    await opened.send(0, "ab")
    await first.until_text("ab")
    second = Events(await user.post(gateway.addresses, path, key="a", stream=True))
    await first.end()
    assert first.error is not None
    assert (first.error["code"], first.done) == ("superseded", False)
    answer = await opened.worker.open(opened.key, opened.attempt, reader=2)
    assert answer.resumes[0].choices[0].count == 0
    await opened.send(0, "abc")
    await fleet.finish(opened.key, opened.attempt, "abc")
    await opened.end(3)
    await second.end()
    assert (second.text, second.done) == ("abc", True)
    again = await (await user.post(gateway.addresses, path, key="a")).json()
    assert again["id"] == second.chunks[0]["id"]
    assert again["created"] == second.chunks[0]["created"]
    assert again["usage"]["completion_tokens"] == 3


async def test_a_key_that_is_used_with_another_body_is_409(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway()
    async with await user.post(gateway.addresses, CHAT, key="a", stream=True):
        response = await user.post(gateway.addresses, CHAT, key="a", temperature=0)
        error = await error_of(response)
    assert (response.status, error["param"], error["code"]) == (409, "Idempotency-Key", "id_taken")
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "ü"])
async def test_a_key_that_can_be_none_is_refused(fleet: Fleet, user: HttpUser, key: str) -> None:
    gateway = await fleet.gateway()
    headers = {"Idempotency-Key": key}
    response = await user.send(gateway.addresses, "POST", COMPLETIONS, json={"prompt": "hi"}, headers=headers)
    assert (response.status, (await error_of(response))["param"]) == (400, "Idempotency-Key")


# Clients that go, and clients that are slow


@BOTH
async def test_a_client_that_hangs_up_cancels_its_request(fleet: Fleet, user: HttpUser, path: str) -> None:
    events, opened = await streaming(fleet, await fleet.gateway(), user, path)
    events.response.close()
    await fleet.record_until(opened.key, lambda record: record.cancel)


@BOTH
async def test_with_a_key_it_is_a_reader_that_left(fleet: Fleet, user: HttpUser, path: str) -> None:
    events, opened = await streaming(fleet, await fleet.gateway(), user, path, key="a")
    events.response.close()
    record = await fleet.record_until(opened.key, lambda record: bool(record.reader_left_at_ms))
    assert (record.state, record.cancel) == (RequestState.PLACED, False)


async def test_an_answer_in_one_document_that_nobody_waits_for_is_cancelled(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    _, writer = await connect(gateway)
    writer.write(post(COMPLETIONS, {"prompt": "hi"}))
    key = await fleet.only_key()
    writer.close()
    await fleet.record_until(key, lambda record: record.state == RequestState.CANCELLED)


async def test_one_with_a_key_lives_on_for_its_retry(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    _, writer = await connect(gateway)
    writer.write(post(COMPLETIONS, {"prompt": "hi"}, "Idempotency-Key: a\r\n"))
    await fleet.stored(fleet.key("a"))
    writer.close()
    record = await fleet.record_until(fleet.key("a"), lambda record: bool(record.reader_left_at_ms))
    assert (record.state, record.cancel) == (RequestState.QUEUED, False)


async def test_a_client_that_takes_nothing_for_long_counts_as_gone(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "WITHIN_S", 0.2)
    gateway = await fleet.gateway()
    _, writer = await connect(gateway, held_bytes=4_096)
    writer.write(post(COMPLETIONS, {"prompt": "hi", "stream": True}))
    opened = await fleet.opened(gateway, await fleet.only_key())
    piece = frame(opened.key, opened.attempt, 0, "x" * 1_000_000, tokens=[5])
    await opened.worker.call.write(delivery_pb2.DeliverRequest(frames=[piece]))
    await fleet.record_until(opened.key, lambda record: record.cancel)
    writer.close()


async def test_what_waits_for_a_client_that_does_not_read_is_joined(fleet: Fleet) -> None:
    num_frames, piece = 200, "x" * 10_000
    gateway = await fleet.gateway()
    reader, writer = await connect(gateway, held_bytes=32_768)
    writer.write(post(COMPLETIONS, {"prompt": "hi", "stream": True}, "Idempotency-Key: a\r\n"))
    await fleet.stored(fleet.key("a"))
    opened = await fleet.opened(gateway, fleet.key("a"))
    for index in range(num_frames):
        one = frame(opened.key, opened.attempt, index, piece, tokens=[5])
        await opened.worker.call.write(delivery_pb2.DeliverRequest(frames=[one]))
    await opened.end(num_frames)
    # A worker that opens again is answered behind everything that it sent before: the gateway has all of it.
    await opened.worker.open(opened.key, opened.attempt)
    async with asyncio.timeout(WITHIN_S):
        answer = bytearray()
        while b"data: [DONE]" not in answer[-100:]:
            answer += await reader.read(1 << 16)
    writer.close()
    chunks = [json.loads(line[6:]) for line in answer.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == piece * num_frames
    assert len(chunks) < num_frames / 2


# Stopping


async def test_a_stopping_gateway_says_so_while_it_lets_its_streams_end(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(drain_ms=60_000)
    events, opened = await streaming(fleet, gateway, user)
    assert (await user.get(gateway.addresses, "/health")).status == 200
    gateway.stop.set()
    async with asyncio.timeout(WITHIN_S):
        while (await user.get(gateway.addresses, "/health")).status != 503:
            await asyncio.sleep(0.02)
    response = await user.post(gateway.addresses, CHAT)
    assert (response.status, (await error_of(response))["code"]) == (503, "draining")
    assert response.headers["Retry-After"] == "1"
    await opened.send(0, "ab")
    await opened.end(2)
    await events.end()
    assert (events.text, events.done) == ("ab", True)
    async with asyncio.timeout(WITHIN_S):
        await gateway.ended


async def test_streams_that_outlast_the_drain_end_with_an_error(fleet: Fleet, user: HttpUser) -> None:
    gateway = await fleet.gateway(drain_ms=0)
    events, opened = await streaming(fleet, gateway, user)
    gateway.stop.set()
    await events.end()
    assert events.error is not None
    assert (events.error["code"], events.done) == ("draining", False)
    async with asyncio.timeout(WITHIN_S):
        await gateway.ended
    assert (await fleet.record(opened.key)).reader_left_at_ms


async def test_hundreds_of_clients_may_connect_before_the_event_loop_takes_the_first(
    fleet: Fleet, user: HttpUser
) -> None:
    gateway = await fleet.gateway()
    host, _, port = gateway.addresses.http.rpartition(":")
    with ExitStack() as connections:
        for _ in range(300):
            # Not awaited: the gateway, on this event loop, takes none meanwhile. A packet that is dropped is sent again
            # after 1 s.
            connections.enter_context(socket.create_connection((host, int(port)), timeout=0.9))
    assert (await user.get(gateway.addresses, "/health")).status == 200


async def served(user: HttpUser, gateway: RunningGateway) -> Events:
    """A stream, as soon as there is room for one."""
    async with asyncio.timeout(WITHIN_S):
        while (response := await user.post(gateway.addresses, CHAT, stream=True)).status == 429:
            await asyncio.sleep(0.02)
    return Events(response)


async def connect(
    gateway: RunningGateway, held_bytes: int = 1 << 16
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection: of what is not read, this side holds about `held_bytes`, and the gateway's the rest."""
    host, _, port = gateway.addresses.http.rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, held_bytes)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    return await asyncio.open_connection(sock=connection, limit=held_bytes)


def post(path: str, fields: dict[str, Any], headers: str = "") -> bytes:
    document = json.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(document)}\r\n"
    return f"{head}{headers}\r\n{document}".encode()


def chunked(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + body
