"""A stream of the core as one JSON document, or as the chunks of a stream. Knows protos and forms, nothing of HTTP."""

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from gen.shoal.inference.v1 import inference_pb2
from services.gateway.http.form import FINISH_REASONS, Form
from services.gateway.http.spelling import Place, Spelling

Responses = AsyncIterator[inference_pb2.GenerateResponse]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller asked to be told beside the text."""

    logprobs: bool
    usage: bool
    """In a stream, a last chunk with all counts."""
    running_usage: bool
    """In a stream, the counts so far in each chunk."""


class Envelope:
    """Writes one request's answer."""

    def __init__(self, form: Form, request_id: str, model: str, created_s: int) -> None:
        """`created_s`: when the request was accepted, in s since the epoch."""
        self._form = form
        self._head = {"id": f"{form.id_prefix}{request_id}", "created": created_s, "model": model}

    async def whole(self, responses: Responses, wanted: Wanted, spelling: Spelling) -> bytes:
        """The one document, once the request has ended. Raises what the responses and the tokenizers raise."""
        texts: defaultdict[int, list[str]] = defaultdict(list)
        places: defaultdict[int, list[Place]] = defaultdict(list)
        async for response in responses:
            match response.WhichOneof("event"):
                case "delta":
                    delta = response.delta
                    texts[delta.choice].append(delta.text)
                    if wanted.logprobs:
                        places[delta.choice] += await spelling.places(delta)
                case "finished":
                    choices = [
                        self._form.whole(
                            choice, "".join(texts[choice]), places[choice] if wanted.logprobs else None, reason
                        )
                        | {"index": choice}
                        for choice, reason in enumerate(_reasons(response.finished))
                    ]
                    return self._written(self._form.whole_object, choices, {"usage": _usage(response.finished.usage)})
        raise AssertionError("a stream of the core ends by `finished` or an error")

    async def chunks(
        self, responses: Responses, num_choices: int, wanted: Wanted, spelling: Spelling
    ) -> AsyncIterator[bytes]:
        """The documents of a stream, each as soon as it can be. Raises as `whole`."""
        counts = _Counts(wanted)
        async for response in responses:
            match response.WhichOneof("event"):
                case "accepted":
                    counts.prompt_tokens = response.accepted.prompt_tokens
                    opening = self._form.opening()
                    if opening is not None:
                        for choice in range(num_choices):
                            yield self._chunk(choice, opening, counts)
                case "delta":
                    delta = response.delta
                    counts.completion_tokens += len(delta.token_ids)
                    places = await spelling.places(delta) if wanted.logprobs else None
                    # Half a character, or a possible stop text, has nothing to show yet.
                    if delta.text or places:
                        yield self._chunk(delta.choice, self._form.piece(delta.choice, delta.text, places), counts)
                case "finished":
                    for choice, reason in enumerate(_reasons(response.finished)):
                        yield self._chunk(choice, self._form.ending(reason), counts)
                    if wanted.usage:
                        usage = {"usage": _usage(response.finished.usage)}
                        yield self._written(self._form.chunk_object, [], usage)

    def _chunk(self, choice: int, part: dict[str, Any], counts: "_Counts") -> bytes:
        return self._written(self._form.chunk_object, [{"index": choice, **part}], counts.told())

    def _written(self, kind: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return msgspec.json.encode({**self._head, "object": kind, "choices": choices, **more})


class _Counts:
    """Tokens of a stream so far."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def told(self) -> dict[str, Any]:
        if self._wanted.running_usage:
            return {"usage": _counts(self.prompt_tokens, self.completion_tokens)}
        # OpenAI's chunks have it as null if the last one will have it.
        return {"usage": None} if self._wanted.usage else {}


def _reasons(finished: inference_pb2.Finished) -> list[str]:
    """Why each choice ended."""
    return [FINISH_REASONS[reason] for reason in (finished.reason, *finished.further_reasons)]


def _usage(usage: inference_pb2.Usage) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}
    return _counts(usage.prompt_tokens, usage.completion_tokens) | details


def _counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
