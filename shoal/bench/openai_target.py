"""Any server with OpenAI's HTTP API as a target: vLLM, llama.cpp, SGLang, Shoal itself."""

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from services.common.tls.files import Tls
from shoal._gateways import CallMetadata
from shoal.bench.ask import Ask
from shoal.bench.target import OnTokens, TargetError, TokenCounts, check_length

_DATA, _DONE = b"data:", b"[DONE]"
_READ_BUFFER_BYTES = 1 << 20
"""A line of a stream may be as long: the first of an echo, say."""


class OpenAITarget:
    """Chats go to /chat/completions, texts and tokens to /completions; all streamed."""

    def __init__(
        self, url: str, model: str, timeout_s: float, headers: CallMetadata = (), tls: Tls | None = None
    ) -> None:
        """`url`: with or without the /v1 at its end. `tls`: of an https one; None: well-known authorities.

        To be made inside an event loop.
        """
        self.name = url
        self.model = model
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._session = aiohttp.ClientSession(
            headers=dict(headers),
            connector=aiohttp.TCPConnector(limit=0, ssl=_context(tls)),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            read_bufsize=_READ_BUFFER_BYTES,
        )

    async def find_model(self) -> None:
        """Take the server's first model if none was named. Raises TargetError: no server, or no model."""
        if self.model:
            return
        try:
            async with self._session.get(f"{self._base}/models") as response:
                listed = await response.json()
            self.model = str(listed["data"][0]["id"])
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            text = f"{self._base} does not answer ({error}). Start a server there, or correct --url"
            raise TargetError("no server", text) from error
        except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
            raise TargetError("no model", f"{self._base}/models names no model ({error}); give one") from error

    async def ask(self, ask: Ask, on_tokens: OnTokens) -> TokenCounts:
        """Send one request and read its stream to the end. Raises TargetError."""
        try:
            counts = await self._ask(ask, on_tokens)
        except TimeoutError as error:
            raise TargetError("timeout", "the answer took too long") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise TargetError(type(error).__name__, str(error)) from error
        check_length(ask, counts.output)
        return counts

    async def close(self) -> None:
        """Hang up."""
        await self._session.close()

    async def _ask(self, ask: Ask, on_tokens: OnTokens) -> TokenCounts:
        path = "chat/completions" if ask.messages else "completions"
        counts = None
        ended = False
        async with self._session.post(f"{self._base}/{path}", json=self._body(ask)) as response:
            if response.status != 200:
                raise TargetError(f"HTTP {response.status}", (await response.text())[:1000])
            async for event in _events(response.content):
                if "error" in event:
                    raise TargetError("error in stream", json.dumps(event["error"])[:1000])
                for choice in event.get("choices", ()):
                    ended = ended or bool(choice.get("finish_reason"))
                    if _has_tokens(choice):
                        on_tokens()
                if usage := event.get("usage"):
                    counts = _counts(usage)
        if not ended:
            raise TargetError("broken stream", "the stream ended before the answer's end")
        if counts is None:
            raise TargetError("no usage", "the server does not count tokens: it ignores stream_options.include_usage")
        return counts

    def _body(self, ask: Ask) -> Mapping[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ask.ignore_eos:
            body["ignore_eos"] = True
        if ask.messages:
            return {**body, "messages": list(ask.messages)}
        return {**body, "prompt": list(ask.token_ids) if ask.prompt is None else ask.prompt}


def _counts(usage: Mapping[str, Any]) -> TokenCounts:
    details = usage.get("prompt_tokens_details") or {}
    return TokenCounts(
        int(usage["completion_tokens"]), int(usage.get("prompt_tokens") or 0), details.get("cached_tokens")
    )


def _context(tls: Tls | None) -> ssl.SSLContext | bool:
    if tls is None:
        return True
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream (WHATWG HTML, section 9.2), as far as OpenAI's servers use them: one line of data each."""
    async for line in content:
        data = line.strip().removeprefix(_DATA).strip() if line.startswith(_DATA) else b""
        if data and data != _DONE:
            yield json.loads(data)


def _has_tokens(choice: Mapping[str, Any]) -> bool:
    if "delta" in choice:
        # A chat's first chunk says who speaks, and may have an empty text.
        return bool(choice["delta"].get("content") or choice["delta"].get("reasoning_content"))
    # Tokens may show no text yet; only the last chunk has neither tokens nor text.
    return bool(choice.get("text")) or not choice.get("finish_reason")
