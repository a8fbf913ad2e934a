"""Ways to have the default model's cases answered, each of which gives the reference's tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gen.shoal.fleet.v1 import engine_pb2
from services.common.model.location import default_model_path
from services.common.model.stored_model import read_stored_model
from services.worker.runner.matrix import pack_float32
from services.worker.runner.models.decoder import Decoder
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder
from tests.unit.test_runner_reference import Answer, Case, DefaultModel, Runs, expected, greedy, run


@dataclass(frozen=True)
class Came:
    """What came of cases."""

    right: int
    """How many have the reference's tokens and end."""
    by: str
    """What happened on the way."""


Way = Callable[[Runs, Sequence[Case]], Came]


def at_once(model: Runs, cases: Sequence[Case]) -> Came:
    return Came(_right(run(model, _commands(cases)).answers, cases), "one batch")


def in_chunks(model: Runs, cases: Sequence[Case]) -> Came:
    ran = run(model, _commands(cases), max_prefill_tokens_per_step=17, block_size_tokens=3, num_blocks=4096)
    return Came(_right(ran.answers, cases), "at most 17 prompt tokens a step, blocks of 3")


def preempted(model: Runs, cases: Sequence[Case]) -> Came:
    most = max(len(case["prompt_token_ids"]) + case["max_tokens"] for case in cases)
    ran = run(model, _commands(cases), block_size_tokens=4, num_blocks=-(-most // 4) + 3)
    assert ran.num_preemptions > 0
    return Came(_right(ran.answers, cases), f"{ran.num_preemptions} preemptions")


def asked_twice(model: Runs, cases: Sequence[Case]) -> Came:
    twice = [*cases, *cases]
    ran = run(model, *[[command] for command in _commands(twice)])
    cached = sum(ran.cached_tokens.values())
    assert cached > 0
    return Came(_right(ran.answers, twice) // 2, f"{cached} tokens of prompts found in the cache")


def moved(model: Runs, cases: Sequence[Case]) -> Came:
    """A third of each answer here, a third on a worker whose model is whole, the rest here again."""
    stored = open_decoder(read_stored_model(default_model_path()))
    whole = DefaultModel(stored.config, Decoder(stored.config, load_decoder(stored, pack_float32, lambda share: None)))
    tokens: dict[int, list[int]] = {number: [] for number in range(1, len(cases) + 1)}
    ends: dict[int, engine_pb2.SequenceEnd.ValueType] = {}
    num_moves = 0
    for worker, thirds in ((model, 1), (whole, 2), (model, 3)):
        going = [
            number
            for number, case in enumerate(cases, 1)
            if ends.get(number) != engine_pb2.SEQUENCE_END_STOP_TOKEN and len(tokens[number]) < case["max_tokens"]
        ]
        num_moves += sum(bool(tokens[number]) for number in going)
        commands = [_part(number, cases[number - 1], tokens[number], thirds) for number in going]
        for number, (given, end) in run(worker, commands).answers.items():
            tokens[number] += given
            ends[number] = end
    answers = {number: (tokens[number], ends[number]) for number in tokens}
    return Came(_right(answers, cases), f"{num_moves} moves to a whole model and back")


def _part(number: int, case: Case, known: list[int], thirds: int) -> engine_pb2.EngineCommand:
    """Ask for a case up to so many thirds of its tokens, of which some are known."""
    most = max(1, case["max_tokens"] * thirds // 3)
    return greedy(number, {**case, "output_token_ids": known, "max_tokens": most}, known=len(known))


def _commands(cases: Sequence[Case]) -> list[engine_pb2.EngineCommand]:
    return [greedy(number, case) for number, case in enumerate(cases, 1)]


def _right(answers: dict[int, Answer], cases: Sequence[Case]) -> int:
    return sum(answers[number] == expected(case) for number, case in enumerate(cases, 1))


WAYS: Mapping[str, Way] = {
    "at-once": at_once,
    "chunks": in_chunks,
    "preempted": preempted,
    "twice": asked_twice,
    "moved": moved,
}
