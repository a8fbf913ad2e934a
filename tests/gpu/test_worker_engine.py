"""A worker that is told to use a GPU answers as one on a CPU: the engine's process, with every way to choose tokens."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen.shoal.fleet.v1 import engine_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.worker.config import WorkerConfig
from services.worker.front.engine_client import EngineUnfitError, start_engine
from tests.gpu.devices import IS_CUDA
from tests.unit.engine_builders import add, add_command
from tests.unit.tiny_models import save, tiny_model
from tests.unit.tiny_tokenizers import KINDS

SMALLEST = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
SMALLEST |= {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Of a model that the interpreter computes in a fraction of a second a step."""
LONGEST_WAIT_S = 240
SIZES = {
    "kv_cache_bytes": 1 << 20,
    "block_size_tokens": 16,
    "max_sequences": 8,
    "max_prefill_tokens_per_step": 64,
    "threads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model("llama", vocab_size=300, eos_token_id=299, **SMALLEST)
    save(model, folder)
    KINDS["llama3"](folder)
    return folder


async def answers(
    config: WorkerConfig, sequences: Sequence[engine_pb2.AddSequence]
) -> dict[int, list[engine_pb2.SequenceOutput]]:
    """Each sequence's outputs, to its end."""
    outputs: dict[int, list[engine_pb2.SequenceOutput]] = {sequence.sequence_id: [] for sequence in sequences}
    async with asyncio.timeout(LONGEST_WAIT_S), start_engine(config) as engine:
        left = set(outputs)
        async for event in engine.events():
            if event.HasField("ready"):
                for sequence in sequences:
                    await engine.send(add_command(sequence))
            for output in event.done.outputs:
                outputs[output.sequence_id].append(output)
                if output.end:
                    left.discard(output.sequence_id)
            if not left:
                break
    return outputs


def sequences_of_each_kind() -> list[engine_pb2.AddSequence]:
    form = inference_pb2.ResponseFormat(choices=inference_pb2.ResponseFormat.Choices(texts=["the end", "then"]))
    greedy = add(1, [5, 6, 7, 8], max_tokens=5, logprobs=2, prompt_logprobs=1, stop_token_ids=())
    drawn = add(2, [9] * 17, max_tokens=5, temperature=0.9, seed=7, stop_token_ids=())
    cut = add(3, [11, 12], max_tokens=5, temperature=1.3, seed=8, stop_token_ids=())
    cut.payload.sampling.top_k, cut.payload.sampling.top_p, cut.payload.sampling.min_p = 20, 0.9, 0.01
    adjusted = add(4, [13, 14, 13], max_tokens=5, stop_token_ids=())
    sampling = adjusted.payload.sampling
    sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty = 1.3, 0.4, 0.2
    sampling.logit_bias[20] = 1.5
    formed = add(5, [30, 31], max_tokens=12, form=form, stop_token_ids=(299,))
    return [greedy, drawn, cut, adjusted, formed]


@pytest.mark.parametrize("shards", [1, 2])
async def test_it_chooses_the_tokens_that_a_worker_on_a_cpu_does(folder: Path, shards: int) -> None:
    if IS_CUDA and torch.cuda.device_count() < shards:
        pytest.skip("takes a GPU a rank")
    on_cpu = WorkerConfig(model_path=folder, **SIZES)  # type: ignore[arg-type]
    on_gpu = replace(on_cpu, device="cuda", dtype="float32", shards=shards)
    expected = await answers(on_cpu, sequences_of_each_kind())
    given = await answers(on_gpu, sequences_of_each_kind())
    for number, outputs in expected.items():
        assert tokens_and_end(given[number]) == tokens_and_end(outputs), f"sequence {number}"
    told, asked = (logprobs_of(each[1]) for each in (given, expected))
    assert told == pytest.approx(asked, abs=1e-4)
    assert len(asked) == 3 + 5


def tokens_and_end(outputs: Sequence[engine_pb2.SequenceOutput]) -> tuple[list[int], int]:
    return [token for output in outputs for token in output.token_ids], outputs[-1].end


def logprobs_of(outputs: Sequence[engine_pb2.SequenceOutput]) -> list[float]:
    return [told.logprob for output in outputs for told in (*output.given_logprobs, *output.logprobs)]


async def test_random_weights_need_no_more_than_a_shape(tmp_path: Path, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = WorkerConfig(
        model_path=tmp_path, device="cuda", dtype="float32", dummy=True, context_tokens=64, **SIZES  # type: ignore[arg-type]
    )  # fmt: skip
    (outputs,) = (await answers(config, [add(1, [5, 6], max_tokens=2, stop_token_ids=())])).values()
    assert len(tokens_and_end(outputs)[0]) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"block_size_tokens": 24}, "--block-size-tokens is 24; on a GPU it is one of 16, 32, 64, 128, 256"),
        ({"kv_cache_bytes": 1}, "--kv-cache-bytes is 1; the least is one block, "),
    ],
)
async def test_a_flag_that_does_not_fit_is_named(folder: Path, flags: dict[str, int], said: str) -> None:
    with pytest.raises(EngineUnfitError, match=said):
        await answers(on_a_gpu(folder, {**SIZES, **flags}), sequences_of_each_kind())


@pytest.mark.skipif(IS_CUDA, reason="there is a GPU")
async def test_without_a_gpu_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(EngineUnfitError, match="--device is cuda, but torch "):
        await answers(on_a_gpu(folder, SIZES), sequences_of_each_kind())


def on_a_gpu(folder: Path, sizes: Mapping[str, int]) -> WorkerConfig:
    return WorkerConfig(model_path=folder, device="cuda", dtype="float32", **sizes)  # type: ignore[arg-type]
