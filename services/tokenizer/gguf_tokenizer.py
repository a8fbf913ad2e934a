"""A tokenizer out of a GGUF file's metadata."""

from collections.abc import Callable, Mapping
from datetime import datetime

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.common.text.gguf_vocabulary import CONTROL, SENTENCEPIECE, USER_DEFINED
from services.tokenizer.chat_template import ChatTemplate, TemplateError
from services.tokenizer.gguf_sentencepiece import build_sentencepiece
from services.tokenizer.model_tokenizer import ModelTokenizer
from services.tokenizer.split_patterns import LLAMA3_PATTERN, QWEN2_PATTERN, TEKKEN_PATTERN, split_by

LLAMA3, QWEN2, TEKKEN = "llama-bpe", "qwen2", "tekken"
PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    LLAMA3: lambda: split_by(LLAMA3_PATTERN),
    QWEN2: lambda: split_by(QWEN2_PATTERN),
    TEKKEN: lambda: split_by(TEKKEN_PATTERN),
}
"""By `tokenizer.ggml.pre`."""
SPECIAL_TOKEN_KEYS: Mapping[str, str] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
TEMPLATE_KEY = "tokenizer.chat_template"
MODEL_KEY, PRE_KEY = "tokenizer.ggml.model", "tokenizer.ggml.pre"
BEGIN_KEY, END_KEY = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"


def read_gguf_tokenizer(file: GgufFile, now: Callable[[], datetime]) -> ModelTokenizer:
    """Read a tokenizer and its chat template. Raises ModelFileError if it is not supported."""
    # Files of these kinds leave it to the reader to know that prompts begin with a token.
    usual = file.metadata.get(MODEL_KEY) == SENTENCEPIECE or file.metadata.get(PRE_KEY) in (LLAMA3, TEKKEN)
    begins = file.require(BEGIN_KEY, bool) if BEGIN_KEY in file.metadata else usual
    ends = file.require(END_KEY, bool) if END_KEY in file.metadata else False
    return ModelTokenizer(
        tokenizer=build_tokenizer(file),
        template=_read_template(file, now),
        prompt_prefix=(file.require(SPECIAL_TOKEN_KEYS["bos_token"], int),) if begins else (),
        prompt_suffix=(file.require(SPECIAL_TOKEN_KEYS["eos_token"], int),) if ends else (),
    )


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """Build the `tokenizers` library's tokenizer from a model's file.

    Raises ModelFileError if the file lacks something or names a pre-tokenizer that is not known here.
    """
    is_sentencepiece = file.require(MODEL_KEY, str) == SENTENCEPIECE
    tokenizer = build_sentencepiece(file) if is_sentencepiece else _build_byte_level(file)
    tokens = file.require_tuple("tokenizer.ggml.tokens", str)
    kinds = file.require_tuple("tokenizer.ggml.token_type", int)
    tokenizer.add_special_tokens(_added_tokens(tokens, kinds, CONTROL))
    tokenizer.add_tokens(_added_tokens(tokens, kinds, USER_DEFINED))
    return tokenizer


def _build_byte_level(file: GgufFile) -> Tokenizer:
    pre = file.require(PRE_KEY, str)
    if pre not in PRE_TOKENIZERS:
        raise ModelFileError(file.path, f"its pre-tokenizer {pre!r} is not supported; {sorted(PRE_TOKENIZERS)} are")
    tokens = file.require_tuple("tokenizer.ggml.tokens", str)
    merges = [_merge(text) for text in file.require_tuple("tokenizer.ggml.merges", str)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        # These take a word that is a token as it is, whatever their merges would make of it.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in (LLAMA3, TEKKEN)))
    except Exception as error:  # the library raises Exception itself
        raise ModelFileError(file.path, f"its tokens and merges are no byte-level BPE: {error}") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    if pre == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


def _added_tokens(tokens: tuple[str, ...], kinds: tuple[int, ...], wanted: int) -> list[AddedToken]:
    """Tokens that are recognised inside text before BPE sees it."""
    return [
        AddedToken(token, special=wanted == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == wanted
    ]


def _read_template(file: GgufFile, now: Callable[[], datetime]) -> ChatTemplate | None:
    """None if the model has no template: it then takes prompts only."""
    if TEMPLATE_KEY not in file.metadata:
        return None
    tokens = file.require_tuple("tokenizer.ggml.tokens", str)
    special_tokens = {}
    for name, key in SPECIAL_TOKEN_KEYS.items():
        if key in file.metadata:
            token_id = file.require(key, int)
            if not 0 <= token_id < len(tokens):
                raise ModelFileError(file.path, f"metadata key {key!r} is {token_id}, which is no token")
            special_tokens[name] = tokens[token_id]
    try:
        return ChatTemplate(file.require(TEMPLATE_KEY, str), special_tokens, now)
    except TemplateError as error:
        raise ModelFileError(file.path, str(error)) from error
