"""What a pool process computes: text to tokens, and tokens to the text that a stream shows.

Knows nothing of gRPC: a pool process would take twice the memory and start half as fast with it.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from gen.shoal.fleet.v1 import tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.model.stored_model import StoredModel
from services.common.text.stop import stop_texts
from services.common.text.stored_vocabulary import read_vocabulary
from services.common.text.text_stream import TextStream
from services.tokenizer.chat_template import TemplateError
from services.tokenizer.pieces import cut_text, may_be_cut
from services.tokenizer.stored_tokenizer import read_tokenizer

if TYPE_CHECKING:
    from services.common.text.grammar import GrammarCompiler

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

    def __init__(self, model: StoredModel, now: Callable[[], datetime] = datetime.now) -> None:
        read = read_tokenizer(model, now)
        self._tokenizer = read.tokenizer
        self._template = read.template
        self._prompt_prefix = read.prompt_prefix
        self._prompt_suffix = read.prompt_suffix
        self._may_cut = may_be_cut(read.tokenizer)
        self._vocabulary = read_vocabulary(model)

    def encode(self, payload: bytes) -> bytes:
        """Serialized EncodeRequest to EncodeResponse. Raises InputError."""
        request = tokenizer_pb2.EncodeRequest()
        _parse(request, payload)
        text = self._text(request)
        response = tokenizer_pb2.EncodeResponse()
        is_prompt = request.HasField("prompt")  # A template writes its special tokens itself.
        response.token_ids.extend(self._prompt_prefix if is_prompt else ())
        for piece in cut_text(text) if self._may_cut else (text,):
            # Not `encode`, which also finds each token's place in the text: half as fast for long texts.
            response.token_ids.extend(self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids)
        response.token_ids.extend(self._prompt_suffix if is_prompt else ())
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
        from services.common.text.grammar_errors import FormatError

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
