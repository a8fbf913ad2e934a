"""Answers of /v1/chat/completions."""

from typing import Any

from services.gateway.http.logprob_lists import Part
from services.gateway.http.spelling import Places, Spelled


class ChatForm:
    """Messages, and in a stream what is added to them."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """Who speaks."""
        return _chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, logprobs: Part | None) -> dict[str, Any]:
        """Text that is added."""
        return _chunk({"content": text}, logprobs)

    def ending(self, finish_reason: str) -> dict[str, Any]:
        """Nothing is added."""
        return _chunk({}, finish_reason=finish_reason)

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        """The message."""
        return {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}

    def logprobs(self, choice: int, places: Places) -> Part:
        """Each token, and the most probable ones at its place."""
        content = [{**_token(place.chosen), "top_logprobs": [_token(token) for token in place.top]} for place in places]
        return {"content": content, "refusal": None}


def _chunk(delta: dict[str, str], logprobs: Part | None = None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _token(token: Spelled) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.spelling)}
