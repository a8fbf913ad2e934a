"""A stop text ends an answer wherever it is split, and no character of it is shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.text.stop import StopFilter, stop_texts
from services.common.text.text_stream import TextStream
from services.common.text.vocabulary import Vocabulary

BYTES = Vocabulary((*(bytes([byte]) for byte in range(256)), b"END", b"xE", b"ND."), ())

texts = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule as a reader would check it: the first prefix that ends with a stop text, without the longest such."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def test_text_up_to_the_stop_text_is_shown() -> None:
    stop_filter = StopFilter(stop_texts(["STOP"]))
    assert stop_filter.feed("before STOP after") == "before "
    assert stop_filter.stopped
    assert stop_filter.feed("more") == stop_filter.end() == ""


def test_a_possible_beginning_is_held_back_and_shown_if_nothing_comes_of_it() -> None:
    stop_filter = StopFilter(stop_texts(["STOP"]))
    assert [stop_filter.feed(text) for text in ("a ST", "O", "NE ST")] == ["a ", "", "STONE "]
    assert stop_filter.end() == "ST"
    assert not stop_filter.stopped


def test_a_stop_text_may_begin_inside_a_failed_one() -> None:
    stop_filter = StopFilter(stop_texts(["aab"]))
    assert "".join(stop_filter.feed(character) for character in "aaab") == "a"
    assert stop_filter.stopped


def test_of_several_the_one_that_is_complete_first_ends_the_text() -> None:
    stop_filter = StopFilter(stop_texts(["abcd", "bc"]))
    assert stop_filter.feed("xabcd") == "xa"


def test_of_several_complete_at_once_the_longest_is_left_out() -> None:
    stop_filter = StopFilter(stop_texts(["c", "abc", "bc"]))
    assert stop_filter.feed("xabc") == "x"


def test_an_empty_stop_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        stop_texts(["a", ""])


def test_the_token_that_completed_the_stop_text_is_named() -> None:
    stream = TextStream(BYTES, stop_texts(["END"]))
    piece = stream.feed([ord("a"), 257, 258, ord("b")])
    assert (piece.text, piece.stopped_at) == ("ax", 2)
    assert stream.feed([ord("c")]).stopped_at == 2
    assert stream.end() == ""


def test_a_stop_text_is_found_over_tokens_that_split_its_characters() -> None:
    for text, stop, shown in (("a日本語b", "本", "a日"), ("😀😁", "😁", "😀"), ("naïve", "ï", "na")):
        stream = TextStream(BYTES, stop_texts([stop]))
        pieces = [stream.feed((byte,)) for byte in text.encode()]
        assert "".join(piece.text for piece in pieces) == shown
        assert pieces[-1].stopped_at is not None


@settings(max_examples=500)
@given(texts, stops, st.data())
def test_a_stop_text_is_found_however_the_text_is_split(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stop_filter = StopFilter(stop_texts(stops))
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += stop_filter.feed(text[start:end])
        assert naive(text, stops)[0].startswith(shown)
    assert (shown + stop_filter.end(), stop_filter.stopped) == naive(text, stops)
