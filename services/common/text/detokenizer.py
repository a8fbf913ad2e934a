"""Tokens to text, as they come: text is given out as soon as no later token can change it."""

from codecs import utf_8_decode
from collections.abc import Sequence

from services.common.text.vocabulary import Vocabulary


class Detokenizer:
    """The text of one sequence of tokens. Whoever feeds it owns it.

    What was given out after some tokens is a function of these tokens alone, however they were split over calls. Bytes
    that are no UTF-8 become U+FFFD, one for each maximal part of a character (Unicode 15, section 3.9), as decoding all
    tokens at once would give; the bytes of an unfinished character, at most 3, are held back.
    """

    __slots__ = ("_pending", "_token_bytes")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._token_bytes = vocabulary.token_bytes
        self._pending = b""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that became certain with these tokens. Raises IndexError for an id not in the vocabulary."""
        token_bytes = self._token_bytes
        raw = self._pending + b"".join([token_bytes[token_id] for token_id in token_ids])
        text, num_decoded = utf_8_decode(raw, "replace", False)
        self._pending = raw[num_decoded:]
        return text

    def end(self) -> str:
        """Return what was held back, as U+FFFD. No token may follow."""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text
