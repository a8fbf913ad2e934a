"""Answers of /v1/completions."""

from collections import defaultdict
from typing import Any

from services.gateway.http.form import PROMPT
from services.gateway.http.logprob_lists import Part
from services.gateway.http.spelling import Place, Places


class CompletionForm:
    """Text. Remembers of one answer how many characters each choice has, for the places of its tokens."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, prompt: str = "") -> None:
        """`prompt`: put in front of each choice."""
        self._prompt = prompt
        self._num_characters: defaultdict[int, int] = defaultdict(lambda: len(prompt), {PROMPT: 0})

    def opening(self) -> dict[str, Any] | None:
        """The prompt, if it is wanted."""
        return self.piece(self._prompt, None) if self._prompt else None

    def piece(self, text: str, logprobs: Part | None) -> dict[str, Any]:
        """Text that follows."""
        return {"text": text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, finish_reason: str) -> dict[str, Any]:
        """No text follows."""
        return {"text": "", "logprobs": None, "finish_reason": finish_reason}

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        """All of the text."""
        return {"text": self._prompt + text, "finish_reason": finish_reason}

    def logprobs(self, choice: int, places: Places) -> Part:
        """Lists with one member a token."""
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


def _by_text(place: Place) -> dict[str, float | None] | None:
    """The most probable tokens and the one that stands there, as OpenAI's: it may be one more than was asked for."""
    if place.chosen.logprob is None:
        return None
    return {token.text: token.logprob for token in (*place.top, place.chosen)}
