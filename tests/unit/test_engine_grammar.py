"""An answer of a given form: what its tokens may be, how it ends, and that no form stops other answers."""

import json
import random
import re
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.fleet.v1 import engine_pb2
from gen.shoal.inference.v1.inference_pb2 import ResponseFormat
from services.common.text.grammar import GrammarCompiler
from services.common.text.vocabulary import Vocabulary
from services.worker.engine.grammar import MAX_CACHED_GRAMMARS, Grammars, SequenceGrammar
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import EngineLoop
from services.worker.engine.planner import Planner
from services.worker.engine.sequence import SequenceId
from services.worker.engine.step_time import StepTimeModel
from tests.unit.engine_builders import (
    STOP_TOKEN,
    VOCABULARY,
    PretendedFront,
    PretendedRunner,
    add,
    add_command,
    limits_of,
    shutdown_command,
)

ROOMY = limits_of(num_blocks=400, context_tokens=1600)
SCHEMA = """{
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "role": {"enum": ["admin", "reader"]},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 500}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": false
        }
    },
    "required": ["name", "role", "scores", "home"],
    "additionalProperties": false
}"""
FORMS = [
    ResponseFormat(json_object=True),
    ResponseFormat(json_schema=SCHEMA),
    ResponseFormat(regex="(ab|c)*[0-9]{2,4}"),
    ResponseFormat(choices=ResponseFormat.Choices(texts=["yes", "yes, please", "nö"])),
]
P = ParamSpec("P")
R = TypeVar("R")


class HandExecutor(Executor):
    """Does its work when told to."""

    def __init__(self) -> None:
        self._jobs: list[Callable[[], None]] = []

    def submit(self, work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
        future: Future[R] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*args, **kwargs))
                except Exception as error:  # noqa: BLE001 - whoever waits for the result gets it
                    future.set_exception(error)

        self._jobs.append(job)
        return future

    def work(self) -> None:
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job()


class Engine:
    """A planner with grammars and a pretended runner, whose wishes are random."""

    def __init__(self, limits: EngineLimits = ROOMY, seed: int = 0, vocabulary: Vocabulary = VOCABULARY) -> None:
        rng = random.Random(seed)
        self.compiles = HandExecutor()
        self.planner = Planner(limits, StepTimeModel(), Grammars(self.compiles, lambda: GrammarCompiler(vocabulary)))
        self.runner = PretendedRunner(limits, lambda context: rng.randrange(1000), steps_ahead=1)
        self.outputs: list[engine_pb2.SequenceOutput] = []

    def add(self, sequence: engine_pb2.AddSequence) -> None:
        self.planner.add(sequence, now_ms=0)

    def step(self) -> bool:
        plan = self.planner.plan()
        if plan:
            self.outputs += self.planner.complete(plan, self.runner.launch(plan).result())
        self.outputs += self.planner.take_ended()
        return plan is not None

    def run(self) -> None:
        self.compiles.work()
        while self.step():
            pass

    def tokens(self, sequence_id: int) -> list[int]:
        return [token for output in self.outputs if output.sequence_id == sequence_id for token in output.token_ids]

    def text(self, sequence_id: int) -> bytes:
        return b"".join(VOCABULARY.token_bytes[token] for token in self.tokens(sequence_id))

    def end(self, sequence_id: int) -> engine_pb2.SequenceOutput:
        (end,) = [output for output in self.outputs if output.sequence_id == sequence_id and output.end]
        return end


def regex(text: str) -> ResponseFormat:
    return ResponseFormat(regex=text)


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_under_a_schema_fits_it(seed: int) -> None:
    engine = Engine(seed=seed)
    engine.add(add(1, max_tokens=1500, form=ResponseFormat(json_schema=SCHEMA)))
    engine.run()
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_COMPLETE
    jsonschema.validate(json.loads(engine.text(1)), json.loads(SCHEMA))


def test_an_answer_ends_with_the_token_that_makes_it_whole_if_nothing_can_follow() -> None:
    engine = Engine()
    engine.add(add(1, max_tokens=50, form=regex("[0-9]{3}")))
    engine.run()
    assert re.fullmatch(b"[0-9]{3}", engine.text(1))
    assert len(engine.tokens(1)) == 3
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_COMPLETE


def test_a_whole_answer_that_may_go_on_may_also_end_by_a_stop_token() -> None:
    engine = Engine()
    engine.runner.next_token = lambda context: STOP_TOKEN
    engine.add(add(1, max_tokens=50, form=regex("[0-9]+")))
    engine.run()
    assert len(engine.tokens(1)) == 2
    assert engine.tokens(1)[-1] == STOP_TOKEN
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_STOP_TOKEN


def test_without_stop_tokens_an_answer_goes_on_while_it_can() -> None:
    engine = Engine()
    engine.add(add(1, max_tokens=20, form=regex("[0-9]+"), stop_token_ids=[]))
    engine.add(add(2, max_tokens=20, form=regex("[0-9]{1,5}"), stop_token_ids=[]))
    engine.run()
    assert len(engine.tokens(1)) == 20
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_LENGTH
    assert len(engine.tokens(2)) == 5
    assert engine.end(2).end == engine_pb2.SEQUENCE_END_COMPLETE


def test_a_stop_token_with_a_text_ends_an_answer_where_the_form_allows_that_text() -> None:
    engine = Engine()
    engine.runner.next_token = lambda context: ord("-")
    engine.add(add(1, max_tokens=50, form=regex("[0-9]{3}-[0-9]{3}"), stop_token_ids=[ord("-")]))
    engine.run()
    assert re.fullmatch(b"[0-9]{3}-", engine.text(1))
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_STOP_TOKEN


def test_max_tokens_may_cut_an_answer_before_it_is_whole() -> None:
    engine = Engine()
    engine.add(add(1, max_tokens=2, form=regex("[0-9]{3}")))
    engine.run()
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_LENGTH


def test_an_answer_whole_at_its_last_allowed_token_is_not_called_cut() -> None:
    engine = Engine()
    engine.add(add(1, max_tokens=3, form=regex("[0-9]{3}")))
    engine.run()
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_COMPLETE


def test_known_and_forced_tokens_are_followed_before_anything_is_sampled() -> None:
    engine = Engine()
    engine.add(add(1, known=b"12", held=True, max_tokens=50, form=regex("12-34[a-z]")))
    engine.compiles.work()
    engine.step()
    engine.planner.release(SequenceId(1), list(b"-3"))
    engine.run()
    assert re.fullmatch(b"4[a-z]", engine.text(1))


def test_a_sequence_may_be_released_while_its_grammar_is_compiled() -> None:
    engine = Engine()
    engine.add(add(1, known=b"12", held=True, max_tokens=50, form=regex("12-34[a-z]")))
    engine.planner.release(SequenceId(1), list(b"-3"))
    engine.run()
    assert re.fullmatch(b"4[a-z]", engine.text(1))


def test_an_answer_that_was_whole_when_its_worker_died_ends_without_a_step() -> None:
    engine = Engine()
    engine.add(add(1, known=b"123", max_tokens=50, form=regex("[0-9]{3}")))
    engine.run()
    assert engine.tokens(1) == []
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_COMPLETE
    assert engine.planner.num_steps == 0


@pytest.mark.parametrize("held", [False, True])
def test_known_tokens_that_the_form_does_not_allow_fail_the_sequence(held: bool) -> None:
    engine = Engine()
    engine.add(add(1, known=b"1x", held=held, form=regex("[0-9]{3}")))
    engine.run()
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_FAILED
    assert engine.end(1).error == "token 120 does not fit the response_format behind the tokens before it"


def test_forced_tokens_that_the_form_does_not_allow_fail_the_sequence() -> None:
    engine = Engine()
    engine.add(add(1, held=True, form=regex("[0-9]{3}")))
    engine.run()
    engine.planner.release(SequenceId(1), [ord("x")])
    engine.run()
    assert "token 120 does not fit" in engine.end(1).error


def test_a_form_that_cannot_be_compiled_fails_its_sequence_alone() -> None:
    engine = Engine()
    engine.add(add(1, form=regex("[0-9")))
    engine.add(add(2, max_tokens=3))
    engine.run()
    assert engine.end(1).error == "response_format.regex unclosed character class"
    assert len(engine.tokens(2)) == 3


def test_an_answer_that_no_token_can_continue_fails() -> None:
    without_z = [text if text != b"z" else b"" for text in VOCABULARY.token_bytes]
    engine = Engine(vocabulary=Vocabulary(tuple(without_z), VOCABULARY.end_token_ids))
    engine.add(add(1, max_tokens=300, form=regex("[ab]z")))
    engine.run()
    assert len(engine.tokens(1)) == 1
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_FAILED
    assert engine.end(1).error == "no token of the vocabulary continues the answer under its response_format"


def test_while_a_grammar_is_compiled_others_are_admitted_and_go_on() -> None:
    engine = Engine()
    engine.add(add(1, form=regex("[0-9]{3}")))
    engine.add(add(2, max_tokens=3))
    while engine.step():
        pass
    assert engine.tokens(1) == []
    assert len(engine.tokens(2)) == 3
    engine.run()
    assert len(engine.tokens(1)) == 3


def test_a_sequence_aborted_while_its_grammar_is_compiled_is_forgotten() -> None:
    engine = Engine()
    engine.add(add(1, form=regex("[0-9]{3}")))
    engine.planner.abort(SequenceId(1))
    engine.run()
    assert engine.outputs == []
    assert not engine.planner.is_preparing


def test_a_sequence_expires_while_its_grammar_is_compiled() -> None:
    engine = Engine()
    engine.add(add(1, form=regex("[0-9]{3}"), remaining_ms=5))
    engine.planner.expire(5)
    engine.run()
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_EXPIRED


def test_choices_of_a_request_go_their_own_ways_under_one_grammar() -> None:
    engine = Engine()
    engine.add(add(1, [7, 8, 9], max_tokens=50, form=FORMS[2]))
    engine.add(add(2, [7, 8, 9], max_tokens=50, form=FORMS[2], fork_of=1))
    engine.run()
    for sequence_id in (1, 2):
        assert re.fullmatch(b"(ab|c)*[0-9]{2,4}", engine.text(sequence_id).rstrip(b"\0"))
    assert engine.tokens(1) != engine.tokens(2)


def test_a_preempted_sequence_goes_on_where_it_was_in_its_form() -> None:
    engine = Engine(limits_of(num_blocks=8, block_size_tokens=4))
    for sequence_id in (1, 2):
        engine.add(add(sequence_id, max_tokens=16, form=regex("[a-z]{15}[0-9]")))
    engine.run()
    assert engine.planner.num_preemptions > 0
    for sequence_id in (1, 2):
        assert re.fullmatch(b"[a-z]{15}[0-9]", engine.text(sequence_id))


def test_a_free_sequence_beside_a_constrained_one_has_no_mask() -> None:
    engine = Engine()
    engine.add(add(1, max_tokens=3, form=regex("[0-9]{3}")))
    engine.add(add(2, max_tokens=3))
    engine.run()
    chunks = [chunk for plan in engine.runner.plans for chunk in plan.chunks if chunk.sample_index is not None]
    masks = {(chunk.sequence_id, chunk.allowed_tokens is None) for chunk in chunks}
    assert masks == {(1, False), (2, True)}


def test_an_idle_engine_notices_a_compiled_grammar_and_plans_no_token_before_the_one_it_depends_on() -> None:
    engine = Engine()
    looks = [[add_command(add(1, form=regex("[a-z][0-9][a-z]")))], *[[] for _ in range(20)], [shutdown_command()]]
    front = PretendedFront(looks, on_take=lambda timeout_ms: engine.compiles.work() if len(looks) == 18 else None)
    EngineLoop(engine.planner, StepTimeModel(), engine.runner, front, lambda: 0.0).run()
    engine.outputs = front.outputs
    assert re.fullmatch(b"[a-z][0-9][a-z]", engine.text(1))
    assert engine.end(1).end == engine_pb2.SEQUENCE_END_COMPLETE
    assert front.timeouts_ms[1] is not None


def test_no_more_than_a_bounded_number_of_grammars_is_kept() -> None:
    executor = HandExecutor()
    grammars = Grammars(executor, lambda: GrammarCompiler(VOCABULARY))
    for number in range(MAX_CACHED_GRAMMARS + 5):
        grammars.prepare(regex(f"a{number}"), frozenset(), ())
    executor.work()
    assert len(grammars._cache) == MAX_CACHED_GRAMMARS


COMPILER = GrammarCompiler(VOCABULARY)
COMPILED = [COMPILER.compile(form) for form in FORMS]


@given(st.sampled_from(range(len(FORMS))), st.randoms(use_true_random=False), st.integers(0, 40))
def test_a_state_advanced_by_known_tokens_allows_what_the_first_one_allowed(
    form: int, rng: random.Random, move_at: int
) -> None:
    stops = frozenset({STOP_TOKEN})
    first = SequenceGrammar(COMPILED[form].start(), stops)
    moved: SequenceGrammar | None = None
    tokens: list[int] = []
    first.follow(tokens)
    while not first.is_over and len(tokens) < 40:
        if len(tokens) == move_at:
            moved = SequenceGrammar(COMPILED[form].start(), stops)
            moved.follow(tokens)
        if moved:
            assert moved.allowed_tokens == first.allowed_tokens
        mask = first.allowed_tokens
        allowed = [token for token in range(VOCABULARY.num_tokens) if mask[token // 8] >> token % 8 & 1]
        token = rng.choice(allowed)
        if token == STOP_TOKEN:
            break
        tokens.append(token)
        first.follow(tokens)
        if moved:
            moved.follow(tokens)
            assert moved.is_over == first.is_over
