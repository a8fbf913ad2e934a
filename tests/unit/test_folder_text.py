"""A folder's tokenizer gives the tokens and the texts that transformers gives, whichever kind it is."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.fleet.v1.tokenizer_pb2 import EncodeRequest, EncodeResponse
from gen.shoal.inference.v1.inference_pb2 import Chat, ChatMessage
from services.common.model.errors import ModelFileError
from services.common.model.stored_model import read_stored_model
from services.common.text.detokenizer import Detokenizer
from services.common.text.stored_vocabulary import read_vocabulary
from services.common.text.vocabulary import Vocabulary
from services.tokenizer.encoding import InputError, TextCodec
from services.tokenizer.gguf_tokenizer import PRE_TOKENIZERS
from services.tokenizer.pieces import cut_text, may_be_cut
from tests.unit.gguf_files import ARRAY, BOOL, F32, I32, STRING, U32, Value, tiny_model
from tests.unit.tiny_tokenizers import KINDS, write_configs

PROMPT = "then"
WORDS = [
    " the",
    "the",
    "an",
    " an",
    "in",
    ".x",
    ".",
    "x",
    " ",
    "  ",
    "\n",
    "9",
    "é",
    "e\u0301",
    "日本",
    "。",
    "'s",
    "<|user|>",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.characters(codec="utf-8"), max_size=12).map("".join)


@dataclass(frozen=True, repr=False)
class Kind:
    """One kind of tokenizer: transformers' own, and what is read of the folder that it saved."""

    reference: Any
    folder: Path
    vocabulary: Vocabulary
    codec: TextCodec

    def encode(self, request: EncodeRequest) -> list[int]:
        return list(EncodeResponse.FromString(self.codec.encode(request.SerializeToString())).token_ids)

    def shown(self, token_ids: list[int]) -> str:
        detokenizer = Detokenizer(self.vocabulary)
        return "".join(detokenizer.feed([token_id]) for token_id in token_ids) + detokenizer.end()

    def shown_by_reference(self, token_ids: list[int]) -> str:
        """What the tokens add to a prompt's text."""
        prompt = self.reference.encode(PROMPT)
        return self.decoded([*prompt, *token_ids])[len(self.decoded(prompt)) :]

    def decoded(self, token_ids: list[int]) -> str:
        text: str = self.reference.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    read = {}
    for name, make in KINDS.items():
        folder = write_configs(tmp_path_factory.mktemp(name))
        reference = make(folder)
        model = read_stored_model(folder)
        read[name] = Kind(reference, folder, read_vocabulary(model), TextCodec(model))
    return read


@pytest.mark.parametrize("name", KINDS)
@given(text=TEXTS)
def test_a_prompt_has_the_tokens_that_transformers_gives_it(kinds: dict[str, Kind], name: str, text: str) -> None:
    kind = kinds[name]
    assert kind.encode(EncodeRequest(prompt=text)) == kind.reference.encode(text)


@pytest.mark.parametrize("name", KINDS)
def test_a_chat_has_the_tokens_that_transformers_gives_it(kinds: dict[str, Kind], name: str) -> None:
    messages = [{"role": "user", "content": "the an 9"}, {"role": "assistant", "content": " then. "}]
    chat = Chat(messages=[ChatMessage(**message) for message in messages])
    kind = kinds[name]
    expected = kind.reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert kind.encode(EncodeRequest(chat=chat)) == expected


@pytest.mark.parametrize("name", KINDS)
@given(text=TEXTS)
def test_an_answer_reads_as_the_continuation_of_its_prompt(kinds: dict[str, Kind], name: str, text: str) -> None:
    kind = kinds[name]
    token_ids = kind.reference.encode(text, add_special_tokens=False)
    assert kind.shown(token_ids) == kind.shown_by_reference(token_ids)


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@given(token_ids=st.lists(st.integers(0, 268)))
def test_any_tokens_at_all_read_as_the_library_says(kinds: dict[str, Kind], name: str, token_ids: list[int]) -> None:
    assert kinds[name].shown(token_ids) == kinds[name].shown_by_reference(token_ids)


def test_halves_of_characters_among_byte_tokens_are_shown_as_for_other_vocabularies(kinds: dict[str, Kind]) -> None:
    kind = kinds["sentencepiece"]
    first, second, end = (kind.reference.convert_tokens_to_ids(token) for token in ("<0xE6>", "<0x97>", "<0xA5>"))
    assert kind.shown([first, second, end]) == "日"
    assert kind.shown([first, second, first, second, end]) == "\ufffd日"


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@given(text=TEXTS)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kinds: dict[str, Kind], name: str, text: str) -> None:
    tokenizer = kinds[name].reference._tokenizer
    assert may_be_cut(tokenizer)
    pieces = list(cut_text(text, piece_chars=1))
    assert "".join(pieces) == text
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_texts_are_not_cut_where_a_token_might_lie_over_the_cut(kinds: dict[str, Kind]) -> None:
    assert not may_be_cut(kinds["sentencepiece"].reference._tokenizer)


GGUF_KINDS = [
    ("llama3", ("gpt2", "llama-bpe"), "<|begin|>"),
    ("qwen2", ("gpt2", "qwen2"), None),
    ("sentencepiece", ("llama", "default"), "<s>"),
]


@pytest.mark.parametrize(("name", "gguf_kind", "begin"), GGUF_KINDS)
def test_a_gguf_file_of_the_same_tokenizer_gives_the_same_tokens_and_texts(
    kinds: dict[str, Kind], tmp_path: Path, name: str, gguf_kind: tuple[str, str], begin: str | None
) -> None:
    kind = kinds[name]
    model = read_stored_model(a_gguf_file(kind, tmp_path, gguf_kind, begin))
    codec = TextCodec(model)
    for text in ("the thén in 1234 .x\n\n  two  words", "e\u0301 日本。the", "<|user|> I'S", ""):
        request = EncodeRequest(prompt=text)
        assert EncodeResponse.FromString(codec.encode(request.SerializeToString())).token_ids == kind.encode(request)
    said = read_vocabulary(model).token_bytes
    assert said == kind.vocabulary.token_bytes[: len(said)]


@pytest.mark.parametrize("ends", [True, False])
def test_a_gguf_file_says_what_is_added_to_prompts(kinds: dict[str, Kind], tmp_path: Path, ends: bool) -> None:
    adds: dict[str, Value] = {f"tokenizer.ggml.add_{key}": (BOOL, ends) for key in ("eos_token", "space_prefix")}
    adds["tokenizer.ggml.add_bos_token"] = (BOOL, False)
    kind = kinds["sentencepiece"]
    codec = TextCodec(read_stored_model(a_gguf_file(kind, tmp_path, ("llama", "default"), "<s>", **adds)))
    encoded = EncodeResponse.FromString(codec.encode(EncodeRequest(prompt="the").SerializeToString()))
    expected = ["▁the", "</s>"] if ends else ["t", "he"]
    assert kind.reference.convert_ids_to_tokens(encoded.token_ids) == expected


def test_a_space_is_put_before_a_space_too_as_sentencepiece_does(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["sentencepiece"]
    codec = TextCodec(read_stored_model(a_gguf_file(kind, tmp_path, ("llama", "default"), "<s>")))
    encoded = EncodeResponse.FromString(codec.encode(EncodeRequest(prompt=" an").SerializeToString()))
    assert kind.reference.convert_ids_to_tokens(encoded.token_ids) == ["<s>", "▁", "▁an"]


def test_a_gguf_file_of_a_vocabulary_without_a_score_for_each_token_is_refused(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    scores: dict[str, Value] = {"tokenizer.ggml.scores": (ARRAY, (F32, [0.0]))}
    path = a_gguf_file(kinds["sentencepiece"], tmp_path, ("llama", "default"), "<s>", **scores)
    with pytest.raises(ModelFileError, match="it has 271 tokens, but scores for 1"):
        TextCodec(read_stored_model(path))


def test_words_of_tekken_end_before_capitals_and_digits_stand_alone() -> None:
    words = PRE_TOKENIZERS["tekken"]().pre_tokenize_str("helloWorld HTML's 12 a/\n b")
    expected = ["hello", "World", "ĠHTML", "'s", "Ġ", "1", "2", "Ġa", "/Ċ", "Ġb"]
    assert [word for word, _ in words] == expected


def a_gguf_file(kind: Kind, folder: Path, gguf_kind: tuple[str, str], begin: str | None, **changes: Value) -> Path:
    """The same vocabulary in the terms of GGUF; scores fall in the order of the merges."""
    content = json.loads((kind.folder / "tokenizer.json").read_text())
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    token_of = {number: text for text, number in content["model"]["vocab"].items()}
    token_of |= {number: entry["content"] for number, entry in added.items()}
    tokens = [token_of[number] for number in range(len(token_of))]

    def type_of(number: int) -> int:
        if number in added:
            return 2 if tokens[number] == "<unk>" else 3 if added[number]["special"] else 4
        return 6 if tokens[number].startswith("<0x") else 1

    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": (STRING, gguf_kind[0]),
        "tokenizer.ggml.pre": (STRING, gguf_kind[1]),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [type_of(number) for number in range(len(tokens))])),
        "tokenizer.ggml.eos_token_id": (U32, 2),
    }
    if gguf_kind[0] == "llama":
        metadata["tokenizer.ggml.scores"] = (ARRAY, (F32, [-float(number) for number in range(len(tokens))]))
    else:
        merges = [" ".join(merge) for merge in content["model"]["merges"]]
        metadata["tokenizer.ggml.merges"] = (ARRAY, (STRING, merges))
    if begin is not None:
        metadata["tokenizer.ggml.bos_token_id"] = (U32, kind.reference.convert_tokens_to_ids(begin))
    return tiny_model(folder, metadata | changes)


def test_tokens_that_only_the_model_has_say_nothing(kinds: dict[str, Kind]) -> None:
    vocabulary = kinds["qwen2"].vocabulary
    assert vocabulary.num_tokens == 300
    assert set(vocabulary.token_bytes[265:]) == {b""}


def test_an_answer_ends_by_the_generation_config_or_else_by_the_config(kinds: dict[str, Kind], tmp_path: Path) -> None:
    assert kinds["qwen2"].vocabulary.end_token_ids == (2, 1)
    folder = changed(kinds["qwen2"], tmp_path, "generation_config.json", lambda config: config.clear())
    assert read_vocabulary(read_stored_model(folder)).end_token_ids == (2,)


def changed(kind: Kind, folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a kind's folder with one of its JSON files changed."""
    for file in kind.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


Change = Callable[[dict[str, Any]], object]
REFUSED: list[tuple[str, str, Change, str]] = [
    ("llama3", "config.json", lambda c: c.update(vocab_size=260), "has the id 260, but the model has 260 tokens"),
    ("llama3", "config.json", lambda c: c.update(vocab_size=10**12), "'vocab_size' is 1000000000000; expected 1 to"),
    ("llama3", "config.json", lambda c: c.pop("vocab_size"), "key 'vocab_size' is missing"),
    ("llama3", "generation_config.json", lambda c: c.update(eos_token_id=[2, 300]), "end token 300 .* not in 0 to 299"),
    ("llama3", "generation_config.json", lambda c: c.update(eos_token_id=[]), "no answer would end"),
    ("llama3", "generation_config.json", lambda c: c.update(eos_token_id="2"), "should be a whole number, but is"),
    ("llama3", "tokenizer.json", lambda c: c["model"].update(type="Unigram"), "of type 'Unigram'; only 'BPE'"),
    ("llama3", "tokenizer.json", lambda c: c.update(decoder={"type": "WordPiece"}), "its decoder is .*WordPiece"),
    ("llama3", "tokenizer.json", lambda c: c.pop("decoder"), "its decoder is {}"),
    ("sentencepiece", "tokenizer.json", lambda c: c["decoder"]["decoders"].pop(1), "its decoder is .*are supported"),
    ("llama3", "tokenizer.json", lambda c: c["model"]["vocab"].update(x="y"), "token 'x' has the id 'y'"),
]


@pytest.mark.parametrize(("name", "file", "change", "problem"), REFUSED)
def test_a_vocabulary_that_cannot_be_shown_exactly_is_refused(
    kinds: dict[str, Kind], tmp_path: Path, name: str, file: str, change: Change, problem: str
) -> None:
    with pytest.raises(ModelFileError, match=problem):
        read_vocabulary(read_stored_model(changed(kinds[name], tmp_path, file, change)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = read_stored_model(write_configs(tmp_path))
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: is missing"):
        read_vocabulary(model)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: is missing"):
        TextCodec(model)


def test_a_damaged_tokenizer_is_refused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    folder = changed(kinds["llama3"], tmp_path, "tokenizer.json", lambda c: c["model"]["merges"].append(["z", "zz"]))
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: cannot be read by the tokenizers library"):
        TextCodec(read_stored_model(folder))


def chat_tokens(folder: Path) -> list[int]:
    codec = TextCodec(read_stored_model(folder), now=lambda: datetime(2030, 1, 2))
    request = EncodeRequest(chat=Chat(messages=[ChatMessage(role="user", content="x")]))
    return list(EncodeResponse.FromString(codec.encode(request.SerializeToString())).token_ids)


def test_a_template_may_lie_in_its_own_file_or_in_the_tokenizers_configuration(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}the"}]
    tokens = {"bos_token": {"content": "<|begin|>", "lstrip": False}, "chat_template": named}
    folder = changed(kinds["llama3"], tmp_path, "tokenizer_config.json", lambda c: c.update(tokens))
    token_of = kinds["llama3"].reference.convert_tokens_to_ids
    (folder / "chat_template.jinja").write_text("{{ bos_token }}an")
    assert chat_tokens(folder) == [token_of("<|begin|>"), token_of("an")]
    (folder / "chat_template.jinja").unlink()
    assert chat_tokens(folder) == [token_of("<|begin|>"), token_of("t"), token_of("he")]


def test_a_model_without_a_template_takes_prompts_only(kinds: dict[str, Kind], tmp_path: Path) -> None:
    folder = changed(kinds["llama3"], tmp_path, "tokenizer_config.json", lambda c: c.clear())
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        chat_tokens(folder)


@pytest.mark.parametrize("template", ["{% for %}", b"\xff\xfe"])
def test_a_damaged_template_is_refused(kinds: dict[str, Kind], tmp_path: Path, template: str | bytes) -> None:
    folder = changed(kinds["llama3"], tmp_path, "tokenizer_config.json", lambda c: c)
    (folder / "chat_template.jinja").write_bytes(template.encode() if isinstance(template, str) else template)
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: "):
        chat_tokens(folder)
