"""The vocabulary of a folder's tokenizer.json: a byte-level one (Llama 3, Qwen), or one with `▁` for a space and tokens
for single bytes, as sentencepiece writes them (Llama 2, Mistral).

An answer continues its prompt: what a decoder does to the beginning of a text (it drops a space) is not done to it.
Bytes that are no UTF-8 are shown as for byte-level vocabularies; the tokenizers library shows as many U+FFFD as bytes.
"""

from collections.abc import Callable, Iterator

from services.common.model.errors import ModelFileError
from services.common.model.folder import ModelFolder, end_token_ids
from services.common.model.json_file import JsonFile, read_json_file
from services.common.text.byte_level import bytes_of_characters
from services.common.text.sentencepiece import SPACE, sentencepiece_bytes
from services.common.text.vocabulary import Vocabulary

# The largest known is 34 MB.
MAX_TOKENIZER_BYTES = 128 << 20
MAX_TOKENS = 1 << 24
_SPACES = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_BYTES, _FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
_DROPPED_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def read_folder_vocabulary(folder: ModelFolder) -> Vocabulary:
    """Read a vocabulary. Tokens of the model that the tokenizer does not know say nothing: Qwen2.5 has 151,936 rows for
    151,665 tokens.

    Raises ModelFileError if tokenizer.json is missing, damaged, of another kind, or knows tokens that the model does
    not.
    """
    num_tokens = folder.config.require("vocab_size", int)
    if not 0 < num_tokens <= MAX_TOKENS:
        raise ModelFileError(folder.config.path, f"'vocab_size' is {num_tokens}; expected 1 to {MAX_TOKENS}")
    file = read_json_file(folder.path / "tokenizer.json", MAX_TOKENIZER_BYTES)
    spell = _spelling(file)
    token_bytes = [b""] * num_tokens
    for text, token_id, is_special in _tokens(file):
        if not 0 <= token_id < num_tokens:
            raise ModelFileError(
                file.path, f"token {text!r} has the id {token_id}, but the model has {num_tokens} tokens (vocab_size)"
            )
        token_bytes[token_id] = b"" if is_special else spell(text)
    return Vocabulary(tuple(token_bytes), end_token_ids(folder, num_tokens))


def _tokens(file: JsonFile) -> Iterator[tuple[str, int, bool]]:
    """Each token with its id and whether it is special. An added token may be in the vocabulary too: it comes later."""
    model = file.section("model")
    if model.optional("type", str, "BPE") != "BPE":
        raise ModelFileError(file.path, f"its model is of type {model.values['type']!r}; only 'BPE' is supported")
    for text, token_id in model.require("vocab", dict).items():
        if not isinstance(token_id, int):
            raise ModelFileError(file.path, f"token {text!r} has the id {token_id!r}, which is no whole number")
        yield text, token_id, False
    for entry in file.optional("added_tokens", list, []):
        added = JsonFile(file.path, entry if isinstance(entry, dict) else {})
        yield added.require("content", str), added.require("id", int), added.optional("special", bool, False)


def _spelling(file: JsonFile) -> Callable[[str], bytes]:
    """How a token's text becomes its bytes, by the decoder. Raises ModelFileError for a decoder of another kind."""
    decoder = file.section("decoder").values
    if decoder.get("type") == "ByteLevel":
        return _byte_level_spelling()
    steps = decoder.get("decoders")
    if steps in ([_SPACES, _BYTES, _FUSE], [_SPACES, _BYTES, _FUSE, _DROPPED_SPACE]):
        return sentencepiece_bytes
    raise ModelFileError(
        file.path,
        f"its decoder is {str(dict(decoder))[:300]}; only 'ByteLevel', and 'Replace' of ▁, 'ByteFallback', 'Fuse' "
        "and 'Strip' of one space in this order, are supported",
    )


def _byte_level_spelling() -> Callable[[str], bytes]:
    alphabet = bytes_of_characters()

    def spell(text: str) -> bytes:
        try:
            return bytes([alphabet[character] for character in text])
        except KeyError:  # An added token is stored as it reads.
            return text.encode()

    return spell
