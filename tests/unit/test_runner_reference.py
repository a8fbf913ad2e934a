"""The default model gives the reference's tokens and log-probabilities, whatever the batch and the chunks."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gen.shoal.fleet.v1 import engine_pb2
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.worker.engine.block_pool import BlockId
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import EngineLoop
from services.worker.engine.planner import Planner
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.engine.step_time import StepTimeModel
from services.worker.runner.batch import make_batch
from services.worker.runner.cpu_runner import CpuRunner
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.linear import make_cpu_linear
from services.worker.runner.models.llama import LlamaModel
from services.worker.runner.models.llama_weights import LlamaConfig
from services.worker.weights.gguf_llama import load_llama, read_llama_config
from tests.unit.engine_builders import PretendedFront, add, add_command, release_command, shutdown_command

REFERENCE = Path(__file__).parent.parent / "reference"
Case = dict[str, Any]


def cases_of(name: str) -> list[Case]:
    return [json.loads(line) for line in (REFERENCE / name).read_text().splitlines()]


CASES = cases_of("smollm2_greedy.jsonl")
SHORT_CASES = [case for case in CASES if len(case["prompt_token_ids"]) + len(case["output_token_ids"]) < 80][:6]


@dataclass(frozen=True)
class DefaultModel:
    config: LlamaConfig
    model: LlamaModel


@pytest.fixture(scope="module")
def default_model() -> DefaultModel:
    file = read_gguf(default_model_path())
    config = read_llama_config(file)
    return DefaultModel(config, LlamaModel(config, load_llama(file, config, make_cpu_linear, lambda share: None)))


class FinishingFront(PretendedFront):
    """Never goes, and says Shutdown when the loop has nothing left to compute."""

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        if self.looks:
            return super().take(timeout_ms)
        return [shutdown_command()] if timeout_ms is None else []


Answer = tuple[list[int], engine_pb2.SequenceEnd.ValueType]


@dataclass(frozen=True)
class Ran:
    """What an engine did."""

    answers: dict[int, Answer]
    """Each sequence's tokens and end."""
    cached_tokens: dict[int, int]
    num_preemptions: int


def run(
    default: DefaultModel,
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
    runner = CpuRunner(default.model, PagedKvCache(default.config, num_blocks, block_size_tokens))
    front = FinishingFront([*looks])
    step_time = StepTimeModel()
    planner = Planner(limits, step_time)
    EngineLoop(planner, step_time, runner, front, lambda: time.monotonic() * 1000).run()
    answers: dict[int, Answer] = {}
    for output in front.outputs:
        tokens, _ = answers.get(output.sequence_id, ([], output.end))
        answers[output.sequence_id] = [*tokens, *output.token_ids], output.end
    cached_tokens = {output.sequence_id: output.cached_tokens for output in front.outputs}
    return Ran(answers, cached_tokens, planner.num_preemptions)


def generate(default: DefaultModel, *looks: list[engine_pb2.EngineCommand], **sizes: int) -> dict[int, Answer]:
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
    num_blocks = -(-most // 4) + 8
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


def test_log_probabilities_are_the_references(default_model: DefaultModel) -> None:
    config = default_model.config
    for case in cases_of("smollm2_logprobs.jsonl"):
        token_ids = [*case["prompt_token_ids"], *case["output_token_ids"]]
        cache = PagedKvCache(config, -(-len(token_ids) // 16), 16)
        greedy_parameters = SamplingParameters(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, choice=0)
        blocks = tuple(BlockId(block) for block in range(len(token_ids)))
        chunk = SequenceChunk(SequenceId(1), tuple(token_ids), 0, blocks, greedy_parameters, None)
        first_row = len(case["prompt_token_ids"]) - 1
        with torch.inference_mode():
            batch = make_batch(StepPlan(1, (chunk,)), 16)
            rows = torch.arange(first_row, len(token_ids) - 1)
            logprobs = default_model.model.forward(replace(batch, sample_rows=rows), cache).log_softmax(dim=1)
        for row, step in zip(logprobs, case["steps"], strict=True):
            assert float(row[step["token_id"]]) == pytest.approx(step["logprob"], abs=1e-3)
            for token_id, logprob in step["top5"]:
                assert float(row[token_id]) == pytest.approx(logprob, abs=1e-3)
