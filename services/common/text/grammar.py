"""Which tokens may follow in an answer of a given form: JSON, a JSON Schema, a regex, choices. By llguidance (ADR 10).

A token may follow if its bytes, behind those so far, are the beginning of some answer of the form. So what is allowed
depends on the tokens so far alone, and a state that is advanced by known tokens is as good as the one that saw them
chosen.
"""

import json
import re
from collections.abc import Collection
from itertools import chain

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from gen.shoal.inference.v1 import inference_pb2
from services.common.text.grammar_errors import FormatError, GrammarError
from services.common.text.vocabulary import Vocabulary

MAX_NESTING = 64
"""Levels of objects and arrays in a schema's text."""
MAX_LEXER_STATES = 20_000
"""An answer's state holds at most so many, of 1 to 2 kB each."""
MAX_GRAMMAR_SYMBOLS = 200_000
# Between JSON's marks; without a bound, a small model may write nothing else until max_tokens.
WHITESPACE = r"[ \n\t]{0,16}"
MAX_SHOWN_CHARACTERS = 300
NOTHING_FOLLOWS = "no token of the vocabulary continues the answer under its response_format"
_PLACE = re.compile(r"^(?:at )?\d+\(\d+\): (?:failed to compile JSON schema: )?")


class GrammarCompiler:
    """Compiles forms for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), n_vocab=vocabulary.num_tokens)
        self._limits = LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SYMBOLS, verbose_errors=False
        )

    def compile(self, form: inference_pb2.ResponseFormat) -> "Grammar":
        """Compile a form; mostly in a few ms, but no bound holds for all. Releases the GIL. Raises FormatError."""
        field = form.WhichOneof("format") or "format"
        # Forcing would ask for the tokens of text that is the only way on, instead of allowing all ways to spell it.
        source = f'%llguidance {{"no_forcing": true}}\nstart: {_start(field, form)}'
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise FormatError(field, _said(matcher.get_error()))
        grammar = Grammar(matcher, self._vocabulary)
        _check_first_token(field, grammar)
        return grammar


class Grammar:
    """A compiled form. Shared by all answers of that form."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def start(self) -> "GrammarState":
        """Return the state of an answer that has no token yet."""
        return GrammarState(self._matcher.deep_copy(), self._vocabulary)


class GrammarState:
    """How far one answer is in its form."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is a whole answer."""
        return self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """Whether it is a whole answer that nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error() and self.is_complete

    def advance(self, token_id: int) -> None:
        """Take in the next token. Raises GrammarError if it is not allowed here."""
        if not self._vocabulary.token_bytes[token_id] or not self._matcher.consume_token(token_id):
            raise GrammarError(f"token {token_id} does not fit the response_format behind the tokens before it")

    def allowed(self, end_token_ids: Collection[int]) -> bytes:
        """Return the tokens that may follow: bit i % 8 of byte i // 8 is token i.

        Once the answer is complete, `end_token_ids` may follow too. Raises GrammarError if no token may.
        """
        num_bytes = -(-self._vocabulary.num_tokens // 8)
        mask = bytearray(self._matcher.compute_bitmask()[:num_bytes])
        if self._matcher.is_error():
            said = _said(self._matcher.get_error())
            raise GrammarError(NOTHING_FOLLOWS if said == "NoExtensionBias" else f"the response_format stopped: {said}")
        # The library's own end token says what `is_complete` says.
        end = self._vocabulary.end_token_ids[0]
        mask[end // 8] &= ~(1 << end % 8)
        if self.is_complete:
            for token_id in end_token_ids:
                mask[token_id // 8] |= 1 << token_id % 8
        if not any(mask):
            raise GrammarError(NOTHING_FOLLOWS)
        return bytes(mask)


class _Tokens:
    """A vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.token_bytes
        self.eos_token_id = vocabulary.end_token_ids[0]
        self.special_token_ids = [token_id for token_id, text in enumerate(self.tokens) if not text]

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("only forcing asks for the tokens of a text, and it is off")


def _start(field: str, form: inference_pb2.ResponseFormat) -> str:
    """The form in llguidance's dialect of Lark."""
    match field:
        case "json_object":
            return _json({"type": "object"})
        case "json_schema":
            return _json(_read_schema(form.json_schema))
        case "regex":
            if _ends_in_escape(form.regex):
                raise FormatError(field, "ends in a backslash that escapes nothing")
            return f"/{regex_to_lark(form.regex)}/"
        case "choices":
            return f"/{'|'.join(map(_literal, form.choices.texts))}/"
        case _:
            raise FormatError(field, "is absent; give one of json_object, json_schema, regex, choices")


def _json(schema: dict[str, object]) -> str:
    options = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
    return f"%json {json.dumps({**schema, 'x-guidance': options}, allow_nan=False)}"


def _ends_in_escape(regex: str) -> bool:
    return (len(regex) - len(regex.rstrip("\\"))) % 2 == 1


def _literal(text: str) -> str:
    """A regex of this text only."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _read_schema(text: str) -> dict[str, object]:
    try:
        schema = json.loads(text)
        json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise FormatError("json_schema", f"is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise FormatError("json_schema", f"is a JSON {type(schema).__name__}; expected an object")
    if "x-guidance" in schema:
        raise FormatError("json_schema", "has the keyword x-guidance, which is not supported")
    if _nesting(schema) > MAX_NESTING:
        raise FormatError("json_schema", f"is nested more than {MAX_NESTING} levels deep")
    return schema


def _nesting(value: object) -> int:
    """Levels of objects and arrays, counted up to one more than the limit."""
    level, levels = [value], 0
    while level and levels <= MAX_NESTING:
        containers = [item for item in level if isinstance(item, dict | list)]
        level = list(chain.from_iterable(item.values() if isinstance(item, dict) else item for item in containers))
        levels += bool(containers)
        if not containers:
            break
    return levels


def _check_first_token(field: str, grammar: Grammar) -> None:
    """Refuse what no token can begin. What leads into a dead end later is found when it is met."""
    try:
        grammar.start().allowed(())
    except GrammarError as error:
        if grammar.start().is_complete:
            raise FormatError(field, "fits the empty text only") from error
        raise FormatError(field, "fits no text") from error


def _said(error: str) -> str:
    """The library's reason on one line, without the places in our source."""
    lines = error.splitlines()
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return _PLACE.sub("", reason)[:MAX_SHOWN_CHARACTERS]
