"""What the tokens of a sequence may be, when its request gives its answer a form.

Forms are compiled beside the loop, in one thread: most take a few ms, but none is short by nature. A sequence waits
for its own outside the queue of those that wait for room; nobody waits for it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

from gen.shoal.inference.v1 import inference_pb2
from services.common.text.grammar_errors import FormatError, GrammarError

if TYPE_CHECKING:
    # An engine that refuses forms, as a benchmark's does, needs no library for them.
    from services.common.text.grammar import Grammar, GrammarCompiler, GrammarState

MAX_CACHED_GRAMMARS = 64


class SequenceGrammar:
    """How far one sequence is in its form. Changed by the planner, as the sequence grows, and never goes back."""

    def __init__(self, state: "GrammarState", stop_token_ids: frozenset[int]) -> None:
        self._state = state
        self._stop_token_ids = stop_token_ids
        self._num_tokens = 0
        self.allowed_tokens = b""
        """As `SequenceChunk.allowed_tokens`; of the next token."""
        self.is_over = False
        """The answer is whole, and nothing may follow."""

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go on to the end of all generated tokens of the sequence. Raises GrammarError if it cannot.

        A stop token ends the answer wherever it is: one with a text may be part of the form too.
        """
        for token_id in token_ids[self._num_tokens :]:
            if token_id in self._stop_token_ids:
                return
            self._state.advance(token_id)
            self._num_tokens += 1
        self.is_over = self._state.is_over
        if not self.is_over:
            self.allowed_tokens = self._state.allowed(self._stop_token_ids)


class Grammars:
    """The forms of an engine's sequences, compiled. Called by the planner; works in `executor`, which has one thread.

    Its queue holds at most one job for each sequence of the engine.
    """

    def __init__(self, executor: Executor, make_compiler: "Callable[[], GrammarCompiler]") -> None:
        """`make_compiler` is called at once, in the thread: it reads the vocabulary."""
        self._executor = executor
        self._compiler = executor.submit(make_compiler)
        self._cache: OrderedDict[bytes, Grammar] = OrderedDict()
        """By the form as bytes, the last used at the end. Touched by the thread only."""

    def prepare(
        self, form: inference_pb2.ResponseFormat, stop_token_ids: frozenset[int], token_ids: Sequence[int]
    ) -> "Future[SequenceGrammar]":
        """Compile a form and follow the tokens that are generated already.

        The future raises GrammarError if the form cannot be compiled, or if the tokens do not fit it.
        """
        return self._executor.submit(self._prepare, form, stop_token_ids, tuple(token_ids))

    def _prepare(
        self, form: inference_pb2.ResponseFormat, stop_token_ids: frozenset[int], token_ids: tuple[int, ...]
    ) -> SequenceGrammar:
        grammar = SequenceGrammar(self._compiled(form).start(), stop_token_ids)
        grammar.follow(token_ids)
        return grammar

    def _compiled(self, form: inference_pb2.ResponseFormat) -> "Grammar":
        key = form.SerializeToString(deterministic=True)
        if key not in self._cache:
            try:
                self._cache[key] = self._compiler.result().compile(form)
            except FormatError as error:
                raise GrammarError(f"response_format.{error.field} {error.problem}") from error
            while len(self._cache) > MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]
