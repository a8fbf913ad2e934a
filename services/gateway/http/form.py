"""What an endpoint's answers look like, choice by choice. envelope.py has what is around them."""

from collections.abc import Mapping
from typing import Any, Protocol

from gen.shoal.inference.v1 import inference_pb2
from services.gateway.http.logprob_lists import Part
from services.gateway.http.spelling import Places

PROMPT = -1
"""Stands for a choice where the prompt's own tokens are told."""
FINISH_REASONS: Mapping[inference_pb2.FinishReason.ValueType, str] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    # OpenAI has no word for it.
    inference_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


class Form(Protocol):
    """The form of one answer. What it returns lacks the choice's `index`."""

    id_prefix: str
    whole_object: str
    """The `object` of an answer in one document."""
    chunk_object: str
    """The same of a chunk of a stream."""

    def opening(self) -> dict[str, Any] | None:
        """What comes before a choice's first token, if anything."""

    def piece(self, text: str, logprobs: Part | None) -> dict[str, Any]:
        """Tokens of a stream. `logprobs`: None: not asked for."""

    def ending(self, finish_reason: str) -> dict[str, Any]:
        """The end of a choice of a stream."""

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        """A choice in one document. Lacks its `logprobs` too."""

    def logprobs(self, choice: int, places: Places) -> Part:
        """Log-probabilities of a choice's next tokens."""
