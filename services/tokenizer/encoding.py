"""What a pool process computes: text to tokens, and tokens to the text that a stream shows.

Knows nothing of gRPC: a pool process would take twice the memory and start half as fast with it.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gen.shoal.fleet.v1 import tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.common.text.stop import stop_texts
from services.common.text.text_stream import TextStream
from services.common.text.vocabulary import CONTROL, USER_DEFINED, read_vocabulary
from services.tokenizer.chat_template import ChatTemplate, TemplateError
from services.tokenizer.pieces import cut_text, is_cut_by

if TYPE_CHECKING:
    from services.common.text.grammar import GrammarCompiler

PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
SPECIAL_TOKEN_KEYS: Mapping[str, str] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
TEMPLATE_KEY = "tokenizer.chat_template"
MAX_SPELLED_TOKENS = 10_000


class InputError(Exception):
    """An input that cannot be taken: the field of the request, and what is wrong with it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


class TextCodec:
    """Encodes and decodes serialized requests of TokenizerService for one model.

    Raises ModelFileError if the model's tokenizer or template is not supported.
    """

    def __init__(self, file: GgufFile, now: Callable[[], datetime] = datetime.now) -> None:
        self._tokenizer = build_tokenizer(file)
        self._may_cut = not any(
            is_cut_by(token.content) for token in self._tokenizer.get_added_tokens_decoder().values()
        )
        self._template = _read_template(file, now)
        self._vocabulary = read_vocabulary(file)

    def encode(self, payload: bytes) -> bytes:
        """Serialized EncodeRequest to EncodeResponse. Raises InputError."""
        request = tokenizer_pb2.EncodeRequest()
        _parse(request, payload)
        text = self._text(request)
        response = tokenizer_pb2.EncodeResponse()
        for piece in cut_text(text) if self._may_cut else (text,):
            # Not `encode`, which also finds each token's place in the text: half as fast for long texts.
            response.token_ids.extend(self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids)
        return response.SerializeToString()

    def decode(self, payload: bytes) -> bytes:
        """Serialized DecodeRequest to DecodeResponse. Raises InputError."""
        request = tokenizer_pb2.DecodeRequest()
        _parse(request, payload)
        token_ids, from_index = request.token_ids, request.from_index
        if from_index > len(token_ids):
            raise InputError("from_index", f"from_index is {from_index}, but there are {len(token_ids)} tokens")
        self._check_known(token_ids)
        if "" in request.stop:
            raise InputError("stop", "a stop text must not be empty")
        stream = TextStream(self._vocabulary, stop_texts(request.stop))
        visible = token_ids[: len(token_ids) - request.last_token_hidden]
        stream.feed(visible[:from_index])
        text = stream.feed(visible[from_index:]).text
        if request.ended and from_index < len(token_ids):
            text += stream.end()  # What was held back is shown with the last token.
        return tokenizer_pb2.DecodeResponse(text=text).SerializeToString()

    def spell(self, payload: bytes) -> bytes:
        """Serialized SpellRequest to SpellResponse. Raises InputError."""
        request = tokenizer_pb2.SpellRequest()
        _parse(request, payload)
        if len(request.token_ids) > MAX_SPELLED_TOKENS:
            raise InputError(
                "token_ids", f"{len(request.token_ids)} tokens are too many; give at most {MAX_SPELLED_TOKENS}"
            )
        self._check_known(request.token_ids)
        spellings = [self._spelling(token_id) for token_id in request.token_ids]
        return tokenizer_pb2.SpellResponse(spellings=spellings).SerializeToString()

    def _spelling(self, token_id: int) -> bytes:
        # A special token shows nothing; the library knows its name.
        return self._vocabulary.token_bytes[token_id] or (self._tokenizer.id_to_token(token_id) or "").encode()

    def _check_known(self, token_ids: Sequence[int]) -> None:
        largest = max(token_ids, default=0)
        if largest >= self._vocabulary.num_tokens:
            raise InputError("token_ids", f"token {largest} is unknown: ids are below {self._vocabulary.num_tokens}")

    def check_format(self, payload: bytes) -> bytes:
        """Serialized CheckFormatRequest to CheckFormatResponse. Raises InputError for a form that cannot be kept."""
        from services.common.text.grammar import FormatError

        request = tokenizer_pb2.CheckFormatRequest()
        _parse(request, payload)
        try:
            self._grammars.compile(request.response_format)
        except FormatError as error:
            field = f"response_format.{error.field}"
            raise InputError(field, f"{field}: {error.problem}") from error
        return tokenizer_pb2.CheckFormatResponse().SerializeToString()

    @cached_property
    def _grammars(self) -> "GrammarCompiler":
        # Made when it is first wanted: it takes 24 MB, and most fleets see no form for hours.
        from services.common.text.grammar import GrammarCompiler

        return GrammarCompiler(self._vocabulary)

    def _text(self, request: tokenizer_pb2.EncodeRequest) -> str:
        kind = request.WhichOneof("input")
        if kind == "prompt":
            return request.prompt
        if kind == "chat":
            return self._render(request.chat)
        raise InputError("input", "neither a prompt nor a chat is given; give exactly one")

    def _render(self, chat: inference_pb2.Chat) -> str:
        if self._template is None:
            raise InputError("chat", "this model has no chat template; use a prompt")
        if not chat.messages:
            raise InputError("chat.messages", "the chat has no messages; give at least 1")
        try:
            return self._template.render(
                [{"role": message.role, "content": message.content} for message in chat.messages]
            )
        except TemplateError as error:
            raise InputError("chat.messages", str(error)) from error


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """Build the `tokenizers` library's byte-level BPE from a model's file. Nothing is added to texts.

    Raises ModelFileError if the file lacks something or names a pre-tokenizer that is not known here.
    """
    pre = file.require("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise ModelFileError(file.path, f"its pre-tokenizer {pre!r} is not supported; {sorted(PRE_TOKENIZERS)} are")
    tokens = file.require_tuple("tokenizer.ggml.tokens", str)
    kinds = file.require_tuple("tokenizer.ggml.token_type", int)
    merges = [_merge(text) for text in file.require_tuple("tokenizer.ggml.merges", str)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises Exception itself
        raise ModelFileError(file.path, f"its tokens and merges are no byte-level BPE: {error}") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added_tokens(tokens, kinds, CONTROL))
    tokenizer.add_tokens(_added_tokens(tokens, kinds, USER_DEFINED))
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


def _parse(
    message: tokenizer_pb2.EncodeRequest
    | tokenizer_pb2.DecodeRequest
    | tokenizer_pb2.SpellRequest
    | tokenizer_pb2.CheckFormatRequest,
    payload: bytes,
) -> None:
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise InputError("", f"not a serialized {message.DESCRIPTOR.full_name}: {error}") from error
