"""The default model gives the reference's tokens and log-probabilities, whatever the batch and the chunks."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from gen.shoal.fleet.v1 import engine_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.worker.engine.block_pool import BlockId
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import EngineLoop
from services.worker.engine.planner import Planner
from services.worker.engine.runner import Runner
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.engine.step_time import StepTimeModel
from services.worker.runner.batch import make_batch
from services.worker.runner.cpu_runner import CpuRunner
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import pack_float32
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.weights.gguf_decoder import open_gguf_decoder
from services.worker.weights.load_decoder import load_decoder
from tests.unit.engine_builders import FinishingFront, add, add_command, release_command

REFERENCE = Path(__file__).parent.parent / "reference"
Case = dict[str, Any]


def cases_of(name: str) -> list[Case]:
    return [json.loads(line) for line in (REFERENCE / name).read_text().splitlines()]


CASES = cases_of("smollm2_greedy.jsonl")
SHORT_CASES = [case for case in CASES if len(case["prompt_token_ids"]) + len(case["output_token_ids"]) < 80][:6]


@dataclass
class DefaultModel:
    config: DecoderConfig
    model: Decoder

    def runner(self, num_blocks: int, block_size_tokens: int) -> Runner:
        return CpuRunner(self.model, PagedKvCache(self.config, num_blocks, block_size_tokens))


class Runs(Protocol):
    """A model that steps can be computed with."""

    config: DecoderConfig

    def runner(self, num_blocks: int, block_size_tokens: int) -> Runner: ...


@pytest.fixture(scope="module")
def default_model() -> DefaultModel:
    stored = open_gguf_decoder(read_gguf(default_model_path()))
    return DefaultModel(stored.config, Decoder(stored.config, load_decoder(stored, pack_float32, lambda share: None)))


Answer = tuple[list[int], engine_pb2.SequenceEnd.ValueType]


@dataclass(frozen=True)
class Ran:
    """What an engine did."""

    answers: dict[int, Answer]
    """Each sequence's tokens and end."""
    cached_tokens: dict[int, int]
    num_preemptions: int
    outputs: list[engine_pb2.SequenceOutput]


def run(
    default: Runs,
    *looks: list[engine_pb2.EngineCommand],
    max_prefill_tokens_per_step: int = 512,
    block_size_tokens: int = 16,
    num_blocks: int = 1024,
) -> Ran:
    """Run an engine on the commands of its first looks at the front."""
    limits = EngineLimits(
        num_blocks=num_blocks,
        block_size_tokens=block_size_tokens,
        max_sequences=32,
        max_prefill_tokens_per_step=max_prefill_tokens_per_step,
        step_budget_ms=1e9,
        context_tokens=default.config.context_tokens,
        vocabulary_size=default.config.vocabulary_size,
    )
    runner = default.runner(num_blocks, block_size_tokens)
    front = FinishingFront([*looks])
    step_time = StepTimeModel()
    planner = Planner(limits, step_time)
    EngineLoop(planner, step_time, runner, front, lambda: time.monotonic() * 1000).run()
    answers: dict[int, Answer] = {}
    for output in front.outputs:
        tokens, _ = answers.get(output.sequence_id, ([], output.end))
        answers[output.sequence_id] = [*tokens, *output.token_ids], output.end
    cached_tokens = {output.sequence_id: output.cached_tokens for output in front.outputs}
    return Ran(answers, cached_tokens, planner.num_preemptions, front.outputs)


def generate(default: Runs, *looks: list[engine_pb2.EngineCommand], **sizes: int) -> dict[int, Answer]:
    return run(default, *looks, **sizes).answers


def greedy(sequence_id: int, case: Case, *, known: int = 0, held: bool = False) -> engine_pb2.EngineCommand:
    sequence = add(
        sequence_id,
        case["prompt_token_ids"],
        max_tokens=case["max_tokens"],
        known=case["output_token_ids"][:known],
        held=held,
    )
    sequence.payload.stop_token_ids[:] = [2]
    return add_command(sequence)


def expected(case: Case, known: int = 0) -> Answer:
    stopped = case["finish_reason"] == "stop"
    return case["output_token_ids"][known:], (
        engine_pb2.SEQUENCE_END_STOP_TOKEN if stopped else engine_pb2.SEQUENCE_END_LENGTH
    )


def test_all_cases_at_once_give_the_references_tokens(default_model: DefaultModel) -> None:
    answers = generate(default_model, [greedy(number, case) for number, case in enumerate(CASES, 1)])
    assert answers == {number: expected(case) for number, case in enumerate(CASES, 1)}


@pytest.mark.parametrize(("chunk_tokens", "block_size_tokens"), [(5, 3), (17, 16), (64, 1)])
def test_chunks_and_blocks_of_odd_sizes_change_no_token(
    default_model: DefaultModel, chunk_tokens: int, block_size_tokens: int
) -> None:
    answers = generate(
        default_model,
        [greedy(number, case) for number, case in enumerate(SHORT_CASES, 1)],
        max_prefill_tokens_per_step=chunk_tokens,
        block_size_tokens=block_size_tokens,
    )
    assert answers == {number: expected(case) for number, case in enumerate(SHORT_CASES, 1)}


def test_a_sequence_alone_gives_the_references_tokens(default_model: DefaultModel) -> None:
    for case in SHORT_CASES[:2]:
        assert generate(default_model, [greedy(1, case)]) == {1: expected(case)}


def test_a_sequence_continued_from_its_first_tokens_ends_as_if_undisturbed(default_model: DefaultModel) -> None:
    case = next(case for case in SHORT_CASES if len(case["output_token_ids"]) > 9)
    forced = case["output_token_ids"][4:7]
    looks = [[greedy(1, case, known=4, held=True)], [], [release_command(1, forced)]]
    assert generate(default_model, *looks) == {1: expected(case, known=7)}


def test_a_prefix_found_in_the_cache_changes_no_token(default_model: DefaultModel) -> None:
    # Two chats share a prefix of about 1,060 tokens; the short cases are each asked twice.
    shared = [case for case in CASES if len(case["prompt_token_ids"]) > 1000][:2]
    asked = [*shared, *SHORT_CASES, *SHORT_CASES]
    looks = [[greedy(number, case)] for number, case in enumerate(asked, 1)]
    ran = run(default_model, *looks)
    assert ran.answers == {number: expected(case) for number, case in enumerate(asked, 1)}
    assert ran.cached_tokens[2] > 1000
    assert any(ran.cached_tokens[number] for number in range(len(asked) - len(SHORT_CASES) + 1, len(asked) + 1))


def test_preemption_changes_no_token(default_model: DefaultModel) -> None:
    most = max(len(case["prompt_token_ids"]) + case["max_tokens"] for case in SHORT_CASES)
    num_blocks = -(-most // 4) + 3
    ran = run(
        default_model,
        [greedy(number, case) for number, case in enumerate(SHORT_CASES, 1)],
        block_size_tokens=4,
        num_blocks=num_blocks,
    )
    assert ran.answers == {number: expected(case) for number, case in enumerate(SHORT_CASES, 1)}
    assert ran.num_preemptions > 0


def test_choices_that_share_a_prompt_give_what_each_gives_alone(default_model: DefaultModel) -> None:
    commands = [sampled(number, SHORT_CASES[0], choice=number - 1) for number in (1, 2, 3)]
    alone = [generate(default_model, [command])[number] for number, command in enumerate(commands, 1)]
    for command in commands[1:]:
        command.add.fork_of = 1
    together = generate(default_model, commands)
    assert [together[number] for number in (1, 2, 3)] == alone


def sampled(sequence_id: int, case: Case, *, choice: int = 0, known: Sequence[int] = ()) -> engine_pb2.EngineCommand:
    sequence = add(sequence_id, case["prompt_token_ids"], max_tokens=12, known=known, temperature=1.0, seed=99)
    sequence.choice = choice
    return add_command(sequence)


def test_sampled_tokens_depend_on_neither_company_nor_interruption(default_model: DefaultModel) -> None:
    case, others = SHORT_CASES[0], SHORT_CASES[1:4]
    undisturbed, _ = generate(default_model, [sampled(1, case)])[1]
    in_company = generate(default_model, [*[greedy(n, other) for n, other in enumerate(others, 2)], sampled(1, case)])
    continued, _ = generate(default_model, [sampled(1, case, known=undisturbed[:5])])[1]
    other_choice, _ = generate(default_model, [sampled(1, case, choice=1)])[1]
    assert in_company[1][0] == undisturbed
    assert continued == undisturbed[5:]
    assert other_choice != undisturbed


LOGPROB_CASES = cases_of("smollm2_logprobs.jsonl")
ASKED_TOP = 5


def hidden_states(default: DefaultModel, token_ids: list[int], scored: list[int]) -> torch.Tensor:
    """Of the last token and those before it that `scored` follow, by one pass: [len(scored) + 1, hidden size]."""
    cache = PagedKvCache(default.config, -(-len(token_ids) // 16), 16)
    blocks = tuple(BlockId(block) for block in range(len(token_ids)))
    chunk = SequenceChunk(SequenceId(1), tuple(token_ids), 0, blocks, SamplingParameters(), 0, tuple(scored))
    with torch.inference_mode():
        return default.model.forward(make_batch(StepPlan(1, (chunk,)), cache), cache)


def directly(default: DefaultModel, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, by one pass of the model over all of them: [num_tokens, vocabulary]."""
    with torch.inference_mode():
        return default.model.logits(hidden_states(default, token_ids, token_ids[1:])).log_softmax(dim=1)


def test_a_row_has_the_same_bits_whatever_other_rows_are_wanted(default_model: DefaultModel) -> None:
    token_ids = CASES[0]["prompt_token_ids"]
    of_all = hidden_states(default_model, token_ids, token_ids[1:])
    for num_scored in (0, 1, 7):
        wanted = hidden_states(default_model, token_ids, token_ids[len(token_ids) - num_scored :])
        assert torch.equal(wanted, of_all[-1 - num_scored :])


def scored(
    default: Runs, sequence: engine_pb2.AddSequence, chunk_tokens: int = 512
) -> tuple[list[inference_pb2.TokenLogprobs], dict[int, inference_pb2.TokenLogprobs]]:
    """Run one sequence; what is told of its sampled tokens, and of given ones by their positions."""
    front = run(default, [add_command(sequence)], max_prefill_tokens_per_step=chunk_tokens)
    sampled: list[inference_pb2.TokenLogprobs] = []
    given: dict[int, inference_pb2.TokenLogprobs] = {}
    for output in front.outputs:
        sampled += output.logprobs
        for position, logprobs in enumerate(output.given_logprobs, output.given_from):
            assert position not in given, "each is told once"
            given[position] = logprobs
    return sampled, given


def check(told: Sequence[inference_pb2.TokenLogprobs], case: Case, first: int = 0) -> None:
    assert len(told) == len(case["steps"]) - first
    for logprobs, step in zip(told, case["steps"][first:], strict=True):
        assert logprobs.logprob == pytest.approx(step["logprob"], abs=1e-3)
        assert [top.token_id for top in logprobs.top] == [token_id for token_id, _ in step["top5"]]
        assert [top.logprob for top in logprobs.top] == pytest.approx([top for _, top in step["top5"]], abs=1e-3)


def asking(case: Case, *, known: int = 0, top: int | None = ASKED_TOP, prompt_top: int | None = None) -> Any:
    return add(
        1,
        case["prompt_token_ids"],
        max_tokens=len(case["output_token_ids"]),
        known=case["output_token_ids"][:known],
        logprobs=top,
        prompt_logprobs=prompt_top,
    )


@pytest.mark.parametrize("case", LOGPROB_CASES, ids=lambda case: case["name"])
def test_log_probabilities_are_the_references(default_model: DefaultModel, case: Case) -> None:
    sampled, given = scored(default_model, asking(case))
    check(sampled, case)
    assert not given


def test_penalties_and_temperature_do_not_change_what_is_told_of_the_models_own_distribution(
    default_model: DefaultModel,
) -> None:
    case = LOGPROB_CASES[0]
    sequence = asking(case, top=0)
    sequence.payload.sampling.temperature = 3.0
    sequence.payload.sampling.repetition_penalty = 1.5
    sequence.payload.sampling.logit_bias[11] = 2.0
    front = run(default_model, [add_command(sequence)])
    tokens = [token for output in front.outputs for token in output.token_ids]
    told = [logprobs for output in front.outputs for logprobs in output.logprobs]
    expected_logprobs = directly(default_model, [*case["prompt_token_ids"], *tokens])[
        len(case["prompt_token_ids"]) - 1 :
    ]
    assert [logprobs.logprob for logprobs in told] == pytest.approx(
        [float(row[token]) for row, token in zip(expected_logprobs, tokens, strict=False)], abs=1e-3
    )
    assert not any(logprobs.top for logprobs in told), "0: the token's own alone"


@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_known_tokens_are_scored_before_others_are_sampled(default_model: DefaultModel, chunk_tokens: int) -> None:
    case = LOGPROB_CASES[0]
    known, first = 9, len(case["prompt_token_ids"])
    sampled, given = scored(default_model, asking(case, known=known), chunk_tokens)
    check(sampled, case, known)
    assert list(given) == list(range(first, first + known))
    check([*given.values(), *sampled], case)


@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_prompt_log_probabilities_are_the_models_own(default_model: DefaultModel, chunk_tokens: int) -> None:
    case = LOGPROB_CASES[0]
    prompt = case["prompt_token_ids"]
    _, given = scored(default_model, asking(case, top=None, prompt_top=3), chunk_tokens)
    logprobs = directly(default_model, prompt)
    assert list(given) == list(range(1, len(prompt)))
    for position, told in given.items():
        row = logprobs[position - 1]
        best = row.topk(3)
        assert told.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-3)
        assert [top.token_id for top in told.top] == best.indices.tolist()
        assert [top.logprob for top in told.top] == pytest.approx(best.values.tolist(), abs=1e-3)
