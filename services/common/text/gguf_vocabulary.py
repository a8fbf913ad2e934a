"""The vocabulary of a GGUF file: a byte-level one."""

from collections.abc import Mapping

from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.common.text.byte_level import bytes_of_characters
from services.common.text.vocabulary import Vocabulary

# Values of `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
END_TOKEN_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_gguf_vocabulary(file: GgufFile) -> Vocabulary:
    """Read a byte-level BPE vocabulary (`tokenizer.ggml.model` = gpt2) from a model's file.

    Raises ModelFileError if the vocabulary is of another kind or contradicts itself.
    """
    model = file.require("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ModelFileError(
            file.path, f"its tokenizer is of kind {model!r}; only byte-level BPE ('gpt2') is supported"
        )
    texts = file.require_tuple("tokenizer.ggml.tokens", str)
    kinds = file.require_tuple("tokenizer.ggml.token_type", int)
    if len(texts) != len(kinds):
        raise ModelFileError(file.path, f"it has {len(texts)} tokens, but types for {len(kinds)}")
    alphabet = bytes_of_characters()
    token_bytes = tuple(
        _token_bytes(file, token_id, text, kind, alphabet)
        for token_id, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    )
    return Vocabulary(token_bytes, _end_token_ids(file, len(texts)))


def _token_bytes(file: GgufFile, token_id: int, text: str, kind: int, alphabet: Mapping[str, int]) -> bytes:
    if kind == USER_DEFINED:  # An added token that is shown is stored as it reads.
        return text.encode()
    if kind != NORMAL:
        return b""
    try:
        return bytes([alphabet[character] for character in text])
    except KeyError as error:
        raise ModelFileError(
            file.path, f"token {token_id}, {text!r}, is not written in the byte-level alphabet"
        ) from error


def _end_token_ids(file: GgufFile, num_tokens: int) -> tuple[int, ...]:
    """Ids in the order of the keys, each once. The first key is required: without it no answer would end."""
    keys = [END_TOKEN_KEYS[0], *(key for key in END_TOKEN_KEYS[1:] if key in file.metadata)]
    token_ids = tuple(dict.fromkeys(file.require(key, int) for key in keys))
    for token_id in token_ids:
        if not 0 <= token_id < num_tokens:
            raise ModelFileError(file.path, f"end token {token_id} is not among its {num_tokens} tokens")
    return token_ids
