"""Answers of /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from services.gateway.http.spelling import Place, Spelled


class ChatForm:
    """Messages, and in a stream what is added to them."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """Who speaks."""
        return _chunk({"role": "assistant", "content": ""})

    def piece(self, choice: int, text: str, places: Sequence[Place] | None) -> dict[str, Any]:
        """Text that is added."""
        return _chunk({"content": text}, places)

    def ending(self, finish_reason: str) -> dict[str, Any]:
        """Nothing is added."""
        return _chunk({}, finish_reason=finish_reason)

    def whole(self, choice: int, text: str, places: Sequence[Place] | None, finish_reason: str) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": text}
        return {"message": message, "logprobs": _logprobs(places), "finish_reason": finish_reason}


def _chunk(
    delta: dict[str, str], places: Sequence[Place] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"delta": delta, "logprobs": _logprobs(places), "finish_reason": finish_reason}


def _logprobs(places: Sequence[Place] | None) -> dict[str, Any] | None:
    if places is None:
        return None
    content = [{**_token(place.chosen), "top_logprobs": [_token(token) for token in place.top]} for place in places]
    return {"content": content, "refusal": None}


def _token(token: Spelled) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.spelling)}
