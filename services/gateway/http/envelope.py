"""A stream of the core as one JSON document, or as the chunks of a stream. Knows protos and forms, nothing of HTTP."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gen.shoal.inference.v1 import inference_pb2
from services.gateway.http.form import FINISH_REASONS, PROMPT, Form
from services.gateway.http.logprob_lists import LogprobLists
from services.gateway.http.spelling import Spelling

Responses = AsyncIterator[inference_pb2.GenerateResponse]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller asked to be told beside the text."""

    logprobs: bool = False
    usage: bool = False
    """In a stream, a last chunk with all counts."""
    running_usage: bool = False
    """In a stream, the counts so far in each chunk."""
    prompt_token_ids: Sequence[int] = ()
    """Of the prompt, if the answer begins with it. Their log-probabilities are told in one document only."""


class Envelope:
    """Writes one request's answer."""

    def __init__(self, form: Form, request_id: str, model: str, created_s: int, spelling: Spelling) -> None:
        """`created_s`: when the request was accepted, in s since the epoch."""
        self._form = form
        self._head = {"id": f"{form.id_prefix}{request_id}", "created": created_s, "model": model}
        self._spelling = spelling

    async def whole(self, responses: Responses, num_choices: int, wanted: Wanted) -> Sequence[bytes]:
        """The one document, in pieces, once the request has ended. Raises what responses and tokenizers raise."""
        texts: list[list[str]] = [[] for _ in range(num_choices)]
        lists = [self._lists(choice) for choice in range(num_choices)]
        async for response in responses:
            match response.WhichOneof("event"):
                case "delta":
                    delta = response.delta
                    texts[delta.choice].append(delta.text)
                    if wanted.logprobs:
                        async for places in self._spelling.places(delta.token_ids, delta.logprobs):
                            lists[delta.choice].add(self._form.logprobs(delta.choice, places))
                case "finished":
                    of_prompt = await self._of_prompt(wanted, response.finished)
                    logprobs = [each.written(of_prompt) if wanted.logprobs else [b"null"] for each in lists]
                    return list(self._document(response.finished, ["".join(each) for each in texts], logprobs))
        raise AssertionError("a stream of the core ends by `finished` or an error")

    def _document(
        self, finished: inference_pb2.Finished, texts: Sequence[str], logprobs: Sequence[Iterable[bytes]]
    ) -> Iterator[bytes]:
        head = {**self._head, "object": self._form.whole_object, "usage": _usage(finished.usage)}
        yield msgspec.json.encode(head)[:-1] + b',"choices":['
        for choice, reason in enumerate(_reasons(finished)):
            part = {"index": choice, **self._form.whole(texts[choice], reason)}
            yield (b"," if choice else b"") + msgspec.json.encode(part)[:-1] + b',"logprobs":'
            # Not copied into one value: they may be 70 MB.
            yield from logprobs[choice]
            yield b"}"
        yield b"]}"

    async def chunks(self, responses: Responses, num_choices: int, wanted: Wanted) -> AsyncIterator[bytes]:
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
                    counts.completion_tokens += len(response.delta.token_ids)
                    async for piece in self._pieces(response.delta, wanted):
                        yield self._chunk(response.delta.choice, piece, counts)
                case "finished":
                    for choice, reason in enumerate(_reasons(response.finished)):
                        yield self._chunk(choice, self._form.ending(reason), counts)
                    if wanted.usage:
                        usage = {"usage": _usage(response.finished.usage)}
                        yield self._written(self._form.chunk_object, [], usage)

    async def _pieces(self, delta: inference_pb2.Delta, wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
        if wanted.logprobs:
            text = delta.text
            async for places in self._spelling.places(delta.token_ids, delta.logprobs):
                yield self._form.piece(text, self._form.logprobs(delta.choice, places))
                text = ""
        # Half a character, or a possible stop text, has nothing to show yet.
        elif delta.text:
            yield self._form.piece(delta.text, None)

    async def _of_prompt(self, wanted: Wanted, finished: inference_pb2.Finished) -> LogprobLists | None:
        token_ids = wanted.prompt_token_ids
        if not (wanted.logprobs and token_ids):
            return None
        lists = self._lists(PROMPT)
        lists.add(self._form.logprobs(PROMPT, [await self._spelling.first_of_prompt(token_ids[0])]))
        # One that was cancelled may have been told none.
        told = token_ids[1 : 1 + len(finished.prompt_logprobs)]
        async for places in self._spelling.places(told, finished.prompt_logprobs):
            lists.add(self._form.logprobs(PROMPT, places))
        return lists

    def _lists(self, choice: int) -> LogprobLists:
        return LogprobLists(self._form.logprobs(choice, ()))

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
