"""Text becomes exactly the tokens that the model was trained with, and tokens the text that a stream shows."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gen.shoal.fleet.v1.tokenizer_pb2 import (
    DecodeRequest,
    DecodeResponse,
    EncodeRequest,
    EncodeResponse,
    SpellRequest,
    SpellResponse,
)
from gen.shoal.inference.v1.inference_pb2 import Chat, ChatMessage
from services.common.model.errors import ModelFileError
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.tokenizer.encoding import InputError, TextCodec
from services.tokenizer.gguf_tokenizer import build_tokenizer
from services.tokenizer.pieces import cut_text
from tests.unit.gguf_files import ARRAY, STRING, U32, Value, tiny_model, tiny_tokenizer_metadata

REFERENCE = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "reference" / "smollm2_greedy.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(read_gguf(default_model_path()))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(read_gguf(default_model_path()))


def tiny_codec(folder: Path, template: str | None = None, **changes: Value) -> TextCodec:
    metadata = tiny_tokenizer_metadata(template) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return TextCodec(read_gguf(tiny_model(folder, metadata)), now=lambda: datetime(2030, 1, 2))


def a_chat(*messages: tuple[str, str]) -> EncodeRequest:
    return EncodeRequest(chat=Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages]))


def encode(codec: TextCodec, request: EncodeRequest) -> list[int]:
    return list(EncodeResponse.FromString(codec.encode(request.SerializeToString())).token_ids)


def decode(codec: TextCodec, request: DecodeRequest) -> str:
    return DecodeResponse.FromString(codec.decode(request.SerializeToString())).text


def spell(codec: TextCodec, token_ids: Sequence[int]) -> list[bytes]:
    request = SpellRequest(token_ids=token_ids)
    return list(SpellResponse.FromString(codec.spell(request.SerializeToString())).spellings)


@pytest.mark.parametrize("case", REFERENCE, ids=[case["name"] for case in REFERENCE])
def test_prompts_encode_and_answers_decode_as_the_reference_says(codec: TextCodec, case: dict[str, object]) -> None:
    if case["kind"] == "chat":
        messages = case["messages"]
        assert isinstance(messages, list)
        request = a_chat(*((message["role"], message["content"]) for message in messages))
    else:
        request = EncodeRequest(prompt=str(case["prompt"]))
    assert encode(codec, request) == case["prompt_token_ids"]
    answer = case["output_token_ids"]
    assert isinstance(answer, list)
    assert decode(codec, DecodeRequest(token_ids=answer, ended=True)) == case["text"]


def test_an_empty_prompt_has_no_tokens(codec: TextCodec) -> None:
    assert encode(codec, EncodeRequest(prompt="")) == []


def test_every_digit_is_a_token_and_special_tokens_are_recognised_in_text(codec: TextCodec) -> None:
    assert len(encode(codec, EncodeRequest(prompt="2024"))) == 4
    assert encode(codec, EncodeRequest(prompt="<|im_end|>")) == [2]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (EncodeRequest(), "input"),
        (a_chat(), "chat.messages"),
    ],
)
def test_an_input_that_says_nothing_is_refused(codec: TextCodec, request_: EncodeRequest, field: str) -> None:
    with pytest.raises(InputError) as caught:
        encode(codec, request_)
    assert caught.value.field == field


def test_bytes_that_are_no_request_are_refused(codec: TextCodec) -> None:
    with pytest.raises(InputError, match="not a serialized"):
        codec.encode(b"\xff\xff\xff")
    with pytest.raises(InputError, match="not a serialized"):
        codec.decode(b"\xff\xff\xff")
    with pytest.raises(InputError, match="not a serialized"):
        codec.spell(b"\xff\xff\xff")


def test_the_text_after_an_index_continues_the_text_before_it(codec: TextCodec) -> None:
    tokens = encode(codec, EncodeRequest(prompt="Grüße, 日本語 and 😀: stop here, please"))
    whole = decode(codec, DecodeRequest(token_ids=tokens, stop=["here"], ended=True))
    assert whole == "Grüße, 日本語 and 😀: stop "
    for index in range(len(tokens)):
        before = decode(codec, DecodeRequest(token_ids=tokens[:index], stop=["here"]))
        after = decode(codec, DecodeRequest(token_ids=tokens, from_index=index, stop=["here"], ended=True))
        assert before + after == whole


def test_what_was_held_back_is_shown_with_the_last_token_once_the_choice_has_ended(codec: TextCodec) -> None:
    tokens = encode(codec, EncodeRequest(prompt="a sto"))
    assert decode(codec, DecodeRequest(token_ids=tokens, stop=["stop"])) == "a "
    assert decode(codec, DecodeRequest(token_ids=tokens, stop=["stop"], ended=True)) == "a sto"
    assert decode(codec, DecodeRequest(token_ids=tokens, from_index=len(tokens), stop=["stop"], ended=True)) == ""


def test_a_token_that_ended_the_choice_by_its_id_is_not_shown(codec: TextCodec) -> None:
    tokens = encode(codec, EncodeRequest(prompt="one two"))
    assert decode(codec, DecodeRequest(token_ids=tokens, ended=True, last_token_hidden=True)) == "one"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (DecodeRequest(token_ids=[5], from_index=2), "from_index"),
        (DecodeRequest(token_ids=[5, 49152]), "token_ids"),
        (DecodeRequest(token_ids=[5], stop=[""]), "stop"),
    ],
)
def test_a_decode_that_makes_no_sense_is_refused(codec: TextCodec, request_: DecodeRequest, field: str) -> None:
    with pytest.raises(InputError) as caught:
        decode(codec, request_)
    assert caught.value.field == field


def test_nothing_to_decode_is_no_text(codec: TextCodec) -> None:
    assert decode(codec, DecodeRequest(ended=True, last_token_hidden=True)) == ""


def test_spelled_tokens_together_are_the_text(codec: TextCodec) -> None:
    text = "Grüße, 日本語 and 😀: stop here, please"
    assert b"".join(spell(codec, encode(codec, EncodeRequest(prompt=text)))).decode() == text


def test_a_special_token_is_spelled_by_its_name(codec: TextCodec) -> None:
    assert spell(codec, [2]) == [b"<|im_end|>"]
    assert spell(codec, []) == []


@pytest.mark.parametrize("token_ids", [[49152], [5] * 10_001])
def test_what_cannot_be_spelled_is_refused(codec: TextCodec, token_ids: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        spell(codec, token_ids)
    assert caught.value.field == "token_ids"


def test_a_template_sees_its_special_tokens_and_the_clock(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ strftime_now('%Y') }}{% endfor %}"
    tokens = encode(tiny_codec(tmp_path, template), a_chat(("user", "abc")))
    assert tokens[0] == 1
    assert decode(tiny_codec(tmp_path), DecodeRequest(token_ids=tokens, ended=True)) == "abc2030"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "refuses this conversation"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "refuses this conversation"),
    ],
)
def test_whatever_a_template_does_becomes_a_clear_refusal(tmp_path: Path, template: str, named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        encode(tiny_codec(tmp_path, template), a_chat(("user", "abc")))
    assert caught.value.field == "chat.messages"


def test_an_unknown_role_does_not_break_the_default_template(codec: TextCodec) -> None:
    assert encode(codec, a_chat(("wizard", "Hello")))


def test_a_model_without_a_template_takes_prompts_only(tmp_path: Path) -> None:
    codec = tiny_codec(tmp_path)
    assert encode(codec, EncodeRequest(prompt="abc")) == [259]
    with pytest.raises(InputError, match="no chat template"):
        encode(codec, a_chat(("user", "abc")))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre": (STRING, "martian")}, "pre-tokenizer 'martian'"),
        ({"merges": (ARRAY, (STRING, ["a zz"]))}, "no byte-level BPE"),
        ({"merges": (ARRAY, (STRING, ["ab"]))}, "no byte-level BPE"),
        ({"bos_token_id": (U32, 999)}, "which is no token"),
    ],
)
def test_a_tokenizer_that_is_not_supported_is_refused_at_the_start(
    tmp_path: Path, changes: dict[str, Value], named: str
) -> None:
    with pytest.raises(ModelFileError, match=named):
        tiny_codec(tmp_path, "{{ bos_token }}", **changes)


def test_a_template_that_cannot_be_compiled_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be compiled"):
        tiny_codec(tmp_path, "{% for %}")


PARTS = [
    "the",
    "a",
    " dog's",
    " ",
    "\n",
    "\r",
    "4",
    "é",
    "日本",
    "カ",
    "<|im_end|>",
    ".",
    "。",
    "!",
    "'",
    "'s",
    "B",
    "и",
    "\u0301",
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=30))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: Tokenizer, words: list[str]) -> None:
    text = "".join(words)
    pieces = list(cut_text(text, piece_chars=1))
    assert "".join(pieces) == text
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
