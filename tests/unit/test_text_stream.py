"""A stream shows the same text however its tokens arrive, and wherever it is resumed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.common.text.detokenizer import Detokenizer
from services.common.text.gguf_vocabulary import read_gguf_vocabulary
from services.common.text.stop import stop_texts
from services.common.text.text_stream import TextStream
from services.common.text.vocabulary import Vocabulary

REFERENCE = Path(__file__).parents[1] / "reference" / "smollm2_greedy.jsonl"

# Ids 0 to 255 are the bytes; then words that break inside characters, and a special token.
WORDS = (b"ab", b"abc", b"\xe3\x81", b"\x82\xe3", "日本".encode(), "é!".encode(), b"\xf0\x9f", b"\x98\x80")
SPECIAL = 256 + len(WORDS)
VOCABULARY = Vocabulary((*(bytes([byte]) for byte in range(256)), *WORDS, b""), (SPECIAL,))

any_token = st.one_of(
    st.sampled_from(b"abc "), st.integers(256, SPECIAL), st.integers(0, 255), st.sampled_from("日é😀".encode())
)
any_tokens = st.lists(any_token, max_size=40)
any_stops = st.lists(st.text("abc 日é\ufffd", min_size=1, max_size=4), max_size=3)


def tokens_of(text: str) -> list[int]:
    return list(text.encode())


def shown_at_once(tokens: list[int], stops: list[str]) -> tuple[str, int | None]:
    stream = TextStream(VOCABULARY, stop_texts(stops))
    piece = stream.feed(tokens)
    return piece.text + stream.end(), piece.stopped_at


@pytest.fixture(scope="module")
def default_vocabulary() -> Vocabulary:
    return read_gguf_vocabulary(read_gguf(default_model_path()))


def test_the_default_models_answers_read_as_the_reference_says(default_vocabulary: Vocabulary) -> None:
    for line in REFERENCE.read_text().splitlines():
        case = json.loads(line)
        stream = TextStream(default_vocabulary)
        pieces = [stream.feed((token,)).text for token in case["output_token_ids"]]
        assert "".join(pieces) + stream.end() == case["text"], case["name"]


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    detokenizer = Detokenizer(VOCABULARY)
    assert [detokenizer.feed((byte,)) for byte in "a€".encode()] == ["a", "", "", "€"]


def test_half_a_character_at_the_end_is_shown_as_a_replacement() -> None:
    stream = TextStream(VOCABULARY)
    assert stream.feed([*tokens_of("a"), 0xE2, 0x82]).text == "a"
    assert stream.end() == "\ufffd"
    assert stream.end() == ""


def test_special_tokens_show_nothing_even_inside_a_character() -> None:
    assert shown_at_once([0xE2, SPECIAL, 0x82, 0xAC, SPECIAL], []) == ("€", None)


def test_an_unknown_token_is_an_error() -> None:
    with pytest.raises(IndexError):
        TextStream(VOCABULARY).feed((SPECIAL + 1,))


@given(any_tokens, st.data())
def test_any_split_of_the_tokens_reads_like_decoding_at_once(tokens: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    detokenizer = Detokenizer(VOCABULARY)
    starts, ends = [0, *cuts], [*cuts, len(tokens)]
    pieces = [detokenizer.feed(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    raw = b"".join(VOCABULARY.token_bytes[token] for token in tokens)
    assert "".join(pieces) + detokenizer.end() == raw.decode("utf-8", "replace")


@settings(max_examples=300)
@given(any_tokens, any_stops, st.data())
def test_what_is_shown_depends_on_the_tokens_alone(tokens: list[int], stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    stream = TextStream(VOCABULARY, stop_texts(stops))
    shown, stopped_at = "", None
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        piece = stream.feed(tokens[start:end])
        shown += piece.text
        stopped_at = piece.stopped_at
        alone = TextStream(VOCABULARY, stop_texts(stops)).feed(tokens[:end])
        assert (shown, stopped_at) == (alone.text, alone.stopped_at)
    assert (shown + stream.end(), stopped_at) == shown_at_once(tokens, stops)


@settings(max_examples=300)
@given(any_tokens, any_stops, st.data())
def test_a_stream_resumed_at_any_index_shows_exactly_the_rest(
    tokens: list[int], stops: list[str], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(tokens)))
    first = TextStream(VOCABULARY, stop_texts(stops)).feed(tokens[:index]).text
    resumed = TextStream(VOCABULARY, stop_texts(stops))
    resumed.feed(tokens[:index])
    rest = resumed.feed(tokens[index:]).text + resumed.end()
    assert first + rest == shown_at_once(tokens, stops)[0]
