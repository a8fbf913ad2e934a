"""A user of a gateway's HTTP, on connections of its own."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientResponse, ClientSession, ClientTimeout

from services.gateway.gateway import Addresses
from tests.contract.gateway_fleet import WITHIN_S

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class HttpUser:
    """Posts bodies and reads answers."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session
        self._responses: list[ClientResponse] = []

    async def post(self, gateway: Addresses, path: str, key: str = "", **fields: Any) -> ClientResponse:
        """The response once its head is here. `key`: the Idempotency-Key."""
        if "messages" not in fields and "prompt" not in fields:
            fields |= {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
        headers = {"Idempotency-Key": key} if key else {}
        return await self.send(gateway, "POST", path, json=fields, headers=headers)

    async def get(self, gateway: Addresses, path: str) -> ClientResponse:
        return await self.send(gateway, "GET", path)

    async def send(self, gateway: Addresses, method: str, path: str, **options: Any) -> ClientResponse:
        response = await self._session.request(method, f"http://{gateway.http}{path}", **options)
        self._responses.append(response)
        return response

    def close(self) -> None:
        """Hang up on what was not read to its end."""
        for response in self._responses:
            response.close()


async def an_http_user() -> AsyncIterator[HttpUser]:
    async with ClientSession(timeout=ClientTimeout(total=WITHIN_S)) as session:
        user = HttpUser(session)
        yield user
        user.close()


class Events:
    """The events of a response, read as they come."""

    def __init__(self, response: ClientResponse) -> None:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        self.response = response
        self.chunks: list[dict[str, Any]] = []
        self.error: dict[str, Any] | None = None
        self.done = False

    @property
    def text(self) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(
            choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices
        )

    async def until_text(self, text: str) -> None:
        while self.text != text:
            assert text.startswith(self.text), (self.text, text)
            assert await self._next(), f"the stream ended at {self.text!r}"

    async def end(self) -> None:
        """Read to the end of the response."""
        while await self._next():
            pass

    async def _next(self) -> bool:
        async with asyncio.timeout(WITHIN_S):
            line = await self.response.content.readline()
            if not line:
                return False
            assert await self.response.content.readline() == b"\n", "an event is a line of data and an empty line"
        assert not self.done
        assert not self.error
        assert line.startswith(b"data: ")
        data = line.removeprefix(b"data: ").rstrip(b"\n")
        if data == b"[DONE]":
            self.done = True
        elif "error" in (document := json.loads(data)):
            self.error = document["error"]
        else:
            self.chunks.append(document)
        return True
