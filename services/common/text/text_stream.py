"""The text that a client sees of one choice's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.text.detokenizer import Detokenizer
from services.common.text.stop import StopFilter, StopText
from services.common.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that became certain, and the index in the choice of the token that completed a stop text, or None."""

    text: str
    stopped_at: int | None


class TextStream:
    """Detokenizes one choice and ends it before a stop text. Whoever feeds it owns it.

    The text given out after token j is a function of tokens 0 to j and the stop texts alone: a stream that is resumed
    elsewhere feeds the tokens before its index, drops their text, and goes on with exactly what is left. Special tokens
    show nothing. A token that ended the choice by its id is not fed, unless it is special: its text is not shown.
    """

    __slots__ = ("_detokenizer", "_num_tokens", "_stop_filter", "_stopped_at", "_watches")

    def __init__(self, vocabulary: Vocabulary, stops: tuple[StopText, ...] = ()) -> None:
        self._detokenizer = Detokenizer(vocabulary)
        self._stop_filter = StopFilter(stops)
        self._watches = bool(stops)
        self._num_tokens = 0
        self._stopped_at: int | None = None

    def feed(self, token_ids: Sequence[int]) -> TextPiece:
        """Return the text that became certain with these tokens; those after `stopped_at` are without effect.

        About 1 µs a token. Raises IndexError for an id not in the vocabulary.
        """
        if not self._watches:
            return TextPiece(self._detokenizer.feed(token_ids), None)
        texts = []
        for token_id in token_ids:
            if self._stopped_at is not None:
                break
            texts.append(self._stop_filter.feed(self._detokenizer.feed((token_id,))))
            if self._stop_filter.stopped:
                self._stopped_at = self._num_tokens
            self._num_tokens += 1
        return TextPiece("".join(texts), self._stopped_at)

    def end(self) -> str:
        """Return what was held back: no token follows. Half a character becomes U+FFFD; after a stop text, nothing."""
        return self._stop_filter.feed(self._detokenizer.end()) + self._stop_filter.end()
