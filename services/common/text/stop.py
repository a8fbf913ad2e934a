"""Texts that end an answer: found however they are split, and never shown."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopText:
    """A text to look for, with the failure table of Knuth, Morris and Pratt (1977).

    `fallback[n]`: length of the longest proper beginning of the text that its first n characters end with.
    """

    text: str
    fallback: tuple[int, ...]


def stop_texts(texts: Iterable[str]) -> tuple[StopText, ...]:
    """Prepare stop texts for any number of filters. Linear in their length. Raises ValueError for an empty one."""
    return tuple(StopText(text, _fallback(text)) for text in dict.fromkeys(texts))


class StopFilter:
    """Passes text on up to the first stop text. Whoever feeds it owns it.

    The first is the one whose last character comes first; of those that end together, the longest. So nothing has to be
    waited for once a stop text is complete, and the result depends on the text alone, not on how it was split. The end
    of the text is held back while it may be the beginning of a stop text.
    """

    __slots__ = ("_held", "_num_matched", "_stops", "stopped")

    def __init__(self, stops: tuple[StopText, ...]) -> None:
        self._stops = stops
        self._num_matched = [0] * len(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return the text that became certain. Once `stopped`, that is none."""
        if self.stopped:
            return ""
        end, match_length = len(text), 0
        for index, stop in enumerate(self._stops):
            num_matched, at = _advance(stop, self._num_matched[index], text, end)
            self._num_matched[index] = num_matched
            length = len(stop.text)
            if num_matched == length and (at < end or length > match_length):
                end, match_length = at, length
        seen = self._held + text[:end]
        self.stopped = match_length > 0
        num_shown = len(seen) - (match_length or max(self._num_matched, default=0))
        self._held = "" if self.stopped else seen[num_shown:]
        return seen[:num_shown]

    def end(self) -> str:
        """Return what was held back: no stop text came of it. No text may follow."""
        held, self._held = self._held, ""
        return held


def _fallback(text: str) -> tuple[int, ...]:
    if not text:
        raise ValueError("a stop text must not be empty")
    table = [0, 0]
    length = 0
    for character in text[1:]:
        while length and text[length] != character:
            length = table[length]
        length += text[length] == character
        table.append(length)
    return tuple(table)


def _advance(stop: StopText, num_matched: int, text: str, end: int) -> tuple[int, int]:
    """Read text[:end] until the stop text is complete. Returns how much of it matches, and where reading ended."""
    wanted, fallback = stop.text, stop.fallback
    position = 0
    while position < end:
        if num_matched == 0:  # Nearly always: skip to the next possible beginning at C's speed.
            position = text.find(wanted[0], position, end)
            if position < 0:
                return 0, end
        character = text[position]
        while num_matched and wanted[num_matched] != character:
            num_matched = fallback[num_matched]
        num_matched += wanted[num_matched] == character
        position += 1
        if num_matched == len(wanted):
            return num_matched, position
    return num_matched, end
