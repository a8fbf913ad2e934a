"""A vocabulary says which bytes each token shows, and which tokens end an answer."""

from pathlib import Path

import pytest

from services.common.model.errors import ModelFileError
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.common.text.byte_level import byte_level_alphabet
from services.common.text.gguf_vocabulary import read_gguf_vocabulary
from services.common.text.vocabulary import Vocabulary
from tests.unit.gguf_files import ARRAY, I32, STRING, U32, Value, tiny_model, tiny_tokenizer_metadata


def read(folder: Path, **changes: Value) -> Vocabulary:
    metadata = tiny_tokenizer_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return read_gguf_vocabulary(read_gguf(tiny_model(folder, metadata)))


def test_every_byte_has_its_own_printable_character() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert all(len(character) == 1 and character.isprintable() for character in alphabet.values())
    assert (alphabet[ord(" ")], alphabet[ord("\n")], alphabet[ord("a")]) == ("Ġ", "Ċ", "a")


def test_tokens_are_their_bytes_and_special_tokens_show_nothing(tmp_path: Path) -> None:
    vocabulary = read(tmp_path)
    assert vocabulary.num_tokens == 260
    assert vocabulary.token_bytes[:2] == (b"", b"")
    assert sorted(vocabulary.token_bytes[2:258]) == [bytes([byte]) for byte in range(256)]
    assert vocabulary.token_bytes[258:] == (b"ab", b"abc")
    assert vocabulary.end_token_ids == (0,)


def test_the_default_models_special_tokens_and_end_token() -> None:
    vocabulary = read_gguf_vocabulary(read_gguf(default_model_path()))
    assert vocabulary.num_tokens == 49152
    assert vocabulary.end_token_ids == (2,)
    assert [token_id for token_id, shown in enumerate(vocabulary.token_bytes) if not shown] == list(range(17))
    assert vocabulary.token_bytes[504] == b"The"


def test_an_added_token_that_is_no_control_token_is_shown_as_it_reads(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, tokens=(ARRAY, (STRING, ["<e>", "two words"])), token_type=(ARRAY, (I32, [3, 4])))
    assert vocabulary.token_bytes == (b"", b"two words")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": (STRING, "bert")}, "of kind 'bert'; only 'gpt2'"),
        ({"token_type": (ARRAY, (I32, [1]))}, "260 tokens, but types for 1"),
        ({"tokens": (ARRAY, (STRING, ["a b"])), "token_type": (ARRAY, (I32, [1]))}, "byte-level alphabet"),
        ({"eos_token_id": (U32, 260)}, "end token 260 is not among"),
        ({"eot_token_id": (STRING, "x")}, "should be of type int"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Value], named: str) -> None:
    with pytest.raises(ModelFileError, match=named):
        read(tmp_path, **changes)
