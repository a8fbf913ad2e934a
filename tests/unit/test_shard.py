"""What each rank of a worker has: everything is somewhere, evenly, and is loaded nowhere else."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.common.config import ConfigError
from services.common.model.location import default_model_path
from services.common.model.stored_model import read_stored_model
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderWeights
from services.worker.runner.models.shard import UNIT, Shard
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder
from tests.unit.kept_matrix import KeptMatrix
from tests.unit.tiny_fp8 import LAYOUTS, save_in_fp8
from tests.unit.tiny_gguf import write_gguf
from tests.unit.tiny_models import save, tiny_model


def config_of(
    num_kv_heads: int = 3, group: int = 3, intermediate_size: int = 1536, vocabulary_size: int = 49152
) -> DecoderConfig:
    return DecoderConfig(
        num_layers=30,
        hidden_size=576,
        intermediate_size=intermediate_size,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        vocabulary_size=vocabulary_size,
        context_tokens=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
    )


SMOLLM2 = config_of()


@st.composite
def dealt(draw: st.DrawFn) -> tuple[DecoderConfig, list[Shard]]:
    """A model and the ranks of a worker that it has something for."""
    config = config_of(
        draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 500)), draw(st.integers(1, 900))
    )
    most = min(config.num_heads, -(-config.intermediate_size // UNIT), -(-config.vocabulary_size // UNIT))
    world_size = draw(st.integers(1, most))
    return config, [Shard(rank, world_size) for rank in range(world_size)]


@given(dealt())
def test_every_head_column_and_token_is_on_one_rank_in_runs_that_are_even(
    model: tuple[DecoderConfig, list[Shard]],
) -> None:
    config, shards = model
    for count, unit, part in (
        (config.num_heads, config.num_heads // config.num_kv_heads, Shard.heads),
        (config.intermediate_size, UNIT, Shard.intermediate),
        (config.vocabulary_size, UNIT, Shard.vocabulary),
    ):
        runs = [part(shard, config) for shard in shards]
        assert [number for run in runs for number in run] == list(range(count))
        sizes = [len(run) for run in runs]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) < 2 * unit, "the last unit may be less than a whole one"


@given(dealt())
def test_a_rank_has_the_keys_that_its_queries_read_and_each_is_read_by_as_many(
    model: tuple[DecoderConfig, list[Shard]],
) -> None:
    config, shards = model
    group = config.num_heads // config.num_kv_heads
    kv_heads = [shard.kv_heads(config) for shard in shards]
    for shard, own in zip(shards, kv_heads, strict=True):
        part = shard.config(config)
        assert part.num_heads % part.num_kv_heads == 0
        # The kernels let query i read key i // (queries a key).
        read = [own[query // (part.num_heads // part.num_kv_heads)] for query in range(part.num_heads)]
        assert read == [head // group for head in shard.heads(config)]
    copies = sum(len(own) for own in kv_heads)
    assert copies == max(config.num_kv_heads, len(shards)), "a key is on more ranks only where there are too few"


@pytest.mark.parametrize(
    ("config", "world_size", "what"),
    [
        (SMOLLM2, 10, "--shards is 10; the model's 9 heads make at most 9"),
        (config_of(intermediate_size=40), 4, "--shards is 4; the model's 40 MLP columns make at most 3"),
        (config_of(vocabulary_size=16), 2, "--shards is 2; the model's 16 tokens make at most 1"),
    ],
)
def test_more_ranks_than_a_model_has_parts_are_refused(config: DecoderConfig, world_size: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Shard(0, world_size).config(config)


Weights = DecoderWeights[KeptMatrix]


def load(path: Path, shard: Shard | None = None) -> Weights:
    return load_decoder(open_decoder(read_stored_model(path)), KeptMatrix, lambda share: None, shard)


def num_weights(weights: Weights) -> int:
    tensors = [weights.embedding, weights.lm_head.weight, weights.norm]
    for layer in weights.layers:
        tensors += [layer.attention_norm, layer.mlp_norm]
        tensors += [matrix.weight for matrix in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)]
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_ranks_weights_of_the_default_model_are_its_share_and_little_more(world_size: int) -> None:
    whole = num_weights(load(default_model_path()))
    parts = [num_weights(load(default_model_path(), Shard(rank, world_size))) for rank in range(world_size)]
    assert max(parts) <= (1 / world_size + 0.05) * whole
    assert sum(parts) < 1.01 * whole


# Parts of blocks in fp8 begin and end within blocks.
@pytest.mark.parametrize("stored_as", ["folder", "gguf", "fp8-blocks", "compressed-channel"])
@pytest.mark.parametrize("name", ["llama-9-heads-of-3", "qwen2-tied", "qwen3"])
def test_the_ranks_parts_make_up_the_model(tmp_path: Path, name: str, stored_as: str) -> None:
    model = tiny_model(name)
    if stored_as in LAYOUTS:
        path = save_in_fp8(model, tmp_path, stored_as)
    else:
        path = save(model, tmp_path) if stored_as == "folder" else write_gguf(model, tmp_path / "tiny.gguf")
    config, whole = open_decoder(read_stored_model(path)).config, load(path)
    shards = [Shard(rank, 3) for rank in range(3)]
    parts = [load(path, shard) for shard in shards]
    assert torch.equal(torch.cat([part.embedding for part in parts]), whole.embedding)
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), whole.lm_head.weight)
    for index, layer in enumerate(whole.layers):
        layers = [part.layers[index] for part in parts]
        assert torch.equal(torch.cat([part.o_proj.weight for part in layers], dim=1), layer.o_proj.weight)
        assert torch.equal(torch.cat([part.down_proj.weight for part in layers], dim=1), layer.down_proj.weight)
        for shard, part in zip(shards, layers, strict=True):
            rows = rows_of_qkv(config, shard)
            assert torch.equal(part.qkv_proj.weight, layer.qkv_proj.weight[rows])
            if layer.qkv_proj.bias is not None and part.qkv_proj.bias is not None:
                assert torch.equal(part.qkv_proj.bias, layer.qkv_proj.bias[rows])
            if layer.qk_norm is not None and part.qk_norm is not None:
                heads = [*shard.heads(config), *(config.num_heads + head for head in shard.kv_heads(config))]
                assert torch.equal(part.qk_norm, layer.qk_norm[heads])
            columns = [*shard.intermediate(config)]
            both = [*columns, *(config.intermediate_size + column for column in columns)]
            assert torch.equal(part.gate_up_proj.weight, layer.gate_up_proj.weight[both])


def rows_of_qkv(config: DecoderConfig, shard: Shard) -> Tensor:
    def of(heads: range, first: int) -> Tensor:
        return torch.arange(heads.start * config.head_dim, heads.stop * config.head_dim) + first

    keys = shard.kv_heads(config)
    return torch.cat([of(shard.heads(config), 0), of(keys, config.q_size), of(keys, config.q_size + config.kv_size)])
