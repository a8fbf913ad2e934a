"""The vocabulary of a GGUF file: a byte-level one (`gpt2`: Llama 3, Qwen), or one of sentencepiece (`llama`: Llama 2,
Mistral)."""

from collections.abc import Callable

from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.common.text.byte_level import bytes_of_characters
from services.common.text.sentencepiece import sentencepiece_bytes
from services.common.text.vocabulary import Vocabulary

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Values of `tokenizer.ggml.model`."""
END_TOKEN_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_gguf_vocabulary(file: GgufFile) -> Vocabulary:
    """Read a vocabulary from a model's file.

    Raises ModelFileError if the vocabulary is of another kind or contradicts itself.
    """
    model = file.require("tokenizer.ggml.model", str)
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise ModelFileError(
            file.path,
            f"its tokenizer is of kind {model!r}; only {BYTE_LEVEL!r} (byte-level) and {SENTENCEPIECE!r} "
            "(sentencepiece) are supported",
        )
    texts = file.require_tuple("tokenizer.ggml.tokens", str)
    kinds = file.require_tuple("tokenizer.ggml.token_type", int)
    if len(texts) != len(kinds):
        raise ModelFileError(file.path, f"it has {len(texts)} tokens, but types for {len(kinds)}")
    spell = sentencepiece_bytes if model == SENTENCEPIECE else _byte_level_spelling(file)
    token_bytes = tuple(_token_bytes(text, kind, spell) for text, kind in zip(texts, kinds, strict=True))
    return Vocabulary(token_bytes, _end_token_ids(file, len(texts)))


def _token_bytes(text: str, kind: int, spell: Callable[[str], bytes]) -> bytes:
    if kind == USER_DEFINED:  # An added token that is shown is stored as it reads.
        return text.encode()
    return spell(text) if kind in (NORMAL, BYTE) else b""


def _byte_level_spelling(file: GgufFile) -> Callable[[str], bytes]:
    alphabet = bytes_of_characters()

    def spell(text: str) -> bytes:
        try:
            return bytes([alphabet[character] for character in text])
        except KeyError as error:
            raise ModelFileError(file.path, f"token {text!r} is not written in the byte-level alphabet") from error

    return spell


def _end_token_ids(file: GgufFile, num_tokens: int) -> tuple[int, ...]:
    """Ids in the order of the keys, each once. The first key is required: without it no answer would end."""
    keys = [END_TOKEN_KEYS[0], *(key for key in END_TOKEN_KEYS[1:] if key in file.metadata)]
    token_ids = tuple(dict.fromkeys(file.require(key, int) for key in keys))
    for token_id in token_ids:
        if not 0 <= token_id < num_tokens:
            raise ModelFileError(file.path, f"end token {token_id} is not among its {num_tokens} tokens")
    return token_ids
