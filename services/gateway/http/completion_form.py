"""Answers of /v1/completions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from services.gateway.http.spelling import Place


class CompletionForm:
    """Text. Remembers of one answer how many characters each choice has, for the places of its tokens."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self) -> None:
        self._num_characters: Counter[int] = Counter()

    def opening(self) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def piece(self, choice: int, text: str, places: Sequence[Place] | None) -> dict[str, Any]:
        """Text that follows."""
        return {"text": text, "logprobs": self._logprobs(choice, places), "finish_reason": None}

    def ending(self, finish_reason: str) -> dict[str, Any]:
        """No text follows."""
        return {"text": "", "logprobs": None, "finish_reason": finish_reason}

    def whole(self, choice: int, text: str, places: Sequence[Place] | None, finish_reason: str) -> dict[str, Any]:
        """All of the text."""
        return {"text": text, "logprobs": self._logprobs(choice, places), "finish_reason": finish_reason}

    def _logprobs(self, choice: int, places: Sequence[Place] | None) -> dict[str, Any] | None:
        if places is None:
            return None
        return {
            "tokens": [place.chosen.text for place in places],
            "token_logprobs": [place.chosen.logprob for place in places],
            "top_logprobs": [_by_text(place) for place in places],
            "text_offset": [self._offset(choice, place) for place in places],
        }

    def _offset(self, choice: int, place: Place) -> int:
        """Where the token begins, in characters of the choice's text: a character belongs to its first byte."""
        offset = self._num_characters[choice]
        self._num_characters[choice] += sum(byte & 0xC0 != 0x80 for byte in place.chosen.spelling)
        return offset


def _by_text(place: Place) -> dict[str, float]:
    """The most probable tokens and the generated one, as OpenAI's: it may be one more than was asked for."""
    return {token.text: token.logprob for token in (*place.top, place.chosen)}
