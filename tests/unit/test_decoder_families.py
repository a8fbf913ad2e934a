"""Models of every family give the logits and tokens that transformers gives, however they are stored and batched."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.common.model.stored_model import read_stored_model
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.runner.batch import make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import pack_float32
from services.worker.runner.models.decoder import Decoder
from services.worker.weights.dequantize import SUPPORTED_TYPES
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder
from tests.unit.ggml_blocks import round_matrices
from tests.unit.tiny_gguf import write_gguf
from tests.unit.tiny_models import CONFIGS, VOCABULARY, reference_greedy, reference_logits, save, tiny_model

GREEDY = SamplingParameters(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, choice=0)
BLOCK_SIZE_TOKENS, BLOCKS_A_SEQUENCE = 4, 20
# Longer than every window, of different lengths, and none a multiple of the block or the chunk.
PROMPTS = [[(7 * index + 3 * length) % VOCABULARY for index in range(length)] for length in (37, 1, 18)]
NUM_NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices this small, a second thread costs more than it computes: 20 times on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def load(path: Path) -> Decoder:
    stored = open_decoder(read_stored_model(path))
    return Decoder(stored.config, load_decoder(stored, pack_float32, lambda share: None))


class Batches:
    """Computes sequences in steps of given chunks, over blocks that lie scattered in the cache."""

    def __init__(self, decoder: Decoder, num_sequences: int) -> None:
        self._decoder = decoder
        num_blocks = num_sequences * BLOCKS_A_SEQUENCE
        self._cache = PagedKvCache(decoder.config, num_blocks, BLOCK_SIZE_TOKENS)
        scattered = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self._tables = [tuple(BlockId(block) for block in scattered[n::num_sequences]) for n in range(num_sequences)]
        self._num_computed = [0] * num_sequences

    @torch.inference_mode()
    def step(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Compute the next tokens of some sequences; the logits after every one of each."""
        planned = []
        for number, token_ids in chunks:
            first = self._num_computed[number]
            self._num_computed[number] += len(token_ids)
            planned.append(
                SequenceChunk(
                    SequenceId(number),
                    tuple(token_ids),
                    first,
                    self._tables[number],
                    GREEDY,
                    sample_index=0,
                    scored_token_ids=tuple(token_ids[1:]),
                )
            )
        batch = make_batch(StepPlan(1, tuple(planned)), self._cache)
        logits = self._decoder.logits(self._decoder.forward(batch, self._cache))
        return list(torch.split(logits, [len(token_ids) for _, token_ids in chunks]))


def check_logits(decoder: Decoder, model: Any, chunk_tokens: int = 5) -> None:
    """Prompts in chunks, all in one batch, those that are through decoding beside those that are not."""
    batches = Batches(decoder, len(PROMPTS))
    expected = [reference_logits(model, prompt) for prompt in PROMPTS]
    for first in range(0, max(len(prompt) for prompt in PROMPTS), chunk_tokens):
        chunks = [(n, prompt[first : first + chunk_tokens]) for n, prompt in enumerate(PROMPTS) if first < len(prompt)]
        for (number, token_ids), logits in zip(chunks, batches.step(chunks), strict=True):
            wanted = expected[number][first : first + len(token_ids)]
            assert float((logits - wanted).abs().max() / wanted.abs().max()) < 2e-5


def greedy(decoder: Decoder, chunk_tokens: int = 5) -> list[list[int]]:
    """Continue all prompts; the first to be through its prompt decodes while the others are in theirs."""
    batches = Batches(decoder, len(PROMPTS))
    waiting = [[*prompt] for prompt in PROMPTS]
    answers: list[list[int]] = [[] for _ in PROMPTS]
    while chunks := [
        (n, waiting[n][:chunk_tokens]) for n, answer in enumerate(answers) if len(answer) < NUM_NEW_TOKENS
    ]:
        for (number, token_ids), logits in zip(chunks, batches.step(chunks), strict=True):
            waiting[number] = waiting[number][len(token_ids) :]
            if not waiting[number]:
                answers[number].append(int(logits[-1].argmax()))
                waiting[number] = [answers[number][-1]]
    return answers


def reference_answers(model: Any) -> list[list[int]]:
    return [reference_greedy(model, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_gives_the_logits_and_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    decoder = load(save(model, tmp_path))
    check_logits(decoder, model)
    assert greedy(decoder) == reference_answers(model)


# GGUF does not say which layers of a Qwen slide.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen2-window-from-layer-1"])
def test_a_gguf_file_gives_the_logits_and_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    decoder = load(write_gguf(model, tmp_path / "tiny.gguf"))
    check_logits(decoder, model)
    assert greedy(decoder) == reference_answers(model)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 64])
@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window-from-layer-1"])
def test_a_window_hides_the_same_however_a_prompt_is_cut(tmp_path: Path, name: str, chunk_tokens: int) -> None:
    model = tiny_model(name)
    check_logits(load(save(model, tmp_path)), model, chunk_tokens)


@pytest.mark.parametrize("window", [1, BLOCK_SIZE_TOKENS, BLOCK_SIZE_TOKENS + 1, 127, 128, 1000])
def test_a_window_of_any_size(tmp_path: Path, window: int) -> None:
    model = tiny_model("mistral-window", sliding_window=window)
    check_logits(load(save(model, tmp_path)), model)


def test_a_model_in_shards_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    save(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_logits(load(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2-tied")
    decoder = load(save(copy.deepcopy(model).to(dtype), tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    check_logits(decoder, model)


# Rows of Llamas are reordered as they are stored, those of others are not.
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType(number) for number in SUPPORTED_TYPES])
def test_a_gguf_file_of_any_type_is_computed_in_float32(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, name: str
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
    model = tiny_model(name, **sizes, num_key_value_heads=2, num_hidden_layers=2, initializer_range=0.05)
    decoder = load(write_gguf(model, tmp_path / "tiny.gguf", kind))
    round_matrices(model, kind)
    check_logits(decoder, model)
    assert greedy(decoder) == reference_answers(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_transformers_4_wrote_is_read_alike(tmp_path: Path, name: str) -> None:
    save(tiny_model(name), tmp_path)
    stored = open_decoder(read_stored_model(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_decoder(read_stored_model(tmp_path)).config == stored.config


def test_a_tied_model_may_hold_its_head_all_the_same(tmp_path: Path) -> None:
    model = tiny_model("qwen3-tied-one-key-head-each")
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    check_logits(load(tmp_path), model)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"tie_word_embeddings is true, but tensor 'lm_head\.weight' differs"):
        load(tmp_path)
