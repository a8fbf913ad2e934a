"""A folder's model is loaded whole and right, or refused with the name of what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.common.model.errors import ModelFileError
from services.common.model.stored_model import read_stored_model
from services.worker.runner.models.decoder_weights import DecoderWeights
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder
from tests.unit.kept_matrix import KeptMatrix
from tests.unit.tiny_models import save, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models, written once each; tests copy what they change."""
    folders: dict[tuple[str, bool], Path] = {}

    def of(name: str, shards: bool = False) -> Path:
        if (name, shards) not in folders:
            options = {"max_shard_size": "40KB"} if shards else {}
            folders[name, shards] = save(tiny_model(name), tmp_path_factory.mktemp(name), **options)
        return folders[name, shards]

    return of


@pytest.fixture
def folder(tmp_path: Path, saved: Callable[..., Path]) -> Callable[..., Path]:
    """A copy of a tiny model's folder, whose config.json has these changes; "absent" takes a key away."""

    def make(name: str = "llama", shards: bool = False, **changes: object) -> Path:
        for file in saved(name, shards).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return tmp_path

    return make


def load(path: Path) -> DecoderWeights[KeptMatrix]:
    return load_decoder(open_decoder(read_stored_model(path)), KeptMatrix, lambda share: None)


def change_tensors(path: Path, **changes: torch.Tensor | None) -> Path:
    """Write model.safetensors again; names with `__` for `.`; None takes a tensor away."""
    tensors: dict[str, Any] = dict(load_file(path / "model.safetensors"))
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("llama", {"architectures": ["MixtralForCausalLM"]}, "'architectures' is .*Mixtral.*computes"),
        ("llama", {"model_type": "mistral"}, "'model_type' is 'mistral', but 'architectures' is .*Llama"),
        ("llama", {"architectures": [["LlamaForCausalLM"]]}, "'architectures' is"),
        ("llama", {"architectures": "absent"}, "key 'architectures' is missing"),
        ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; this engine supports 'silu' only"),
        ("llama", {"attention_bias": True}, "'attention_bias' is True; this engine supports False only"),
        ("llama", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'rope_type' is 'yarn'; .*'llama3' only"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_type' is 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "key 'low_freq_factor' is missing"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope parameters differ by layer"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, r"marks layers \[0, 1, 2\] as sliding"),
        ("llama", {"hidden_size": "large"}, "key 'hidden_size' should be a whole number, but is \"large\""),
        ("llama", {"num_hidden_layers": 0}, "a size of the model is below 1"),
        ("llama", {"num_key_value_heads": 4}, "its heads do not divide what they share"),
        ("llama", {"rms_norm_eps": "absent"}, "key 'rms_norm_eps' is missing"),
        ("llama", {"num_hidden_layers": 2}, r"tensor 'model\.layers\.2\..*' has no place in this architecture"),
        ("llama", {"num_hidden_layers": 4}, r"'model\.layers\.3\..*' is missing from the 30"),
        ("llama", {"vocab_size": 97}, r"'model\.embed_tokens\.weight' has shape \[96, 48\]; expected \[97, 48\]"),
        ("mistral-window", {"sliding_window": "absent"}, "key 'sliding_window' is missing"),
        ("mistral-window", {"sliding_window": 0}, "'sliding_window' is 0; expected at least 1"),
        ("qwen2-window-from-layer-1", {"layer_types": ["chunked_attention"] * 3}, "'layer_types' is .*; expected 3 of"),
        ("qwen2-window-from-layer-1", {"use_sliding_window": False}, r"marks layers \[1, 2\] as sliding"),
    ],
)  # fmt: skip
def test_a_model_that_would_be_computed_wrongly_is_refused(
    folder: Callable[..., Path], name: str, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(ModelFileError, match=problem):
        load(folder(name, **changes))


def test_a_missing_tensor_is_named(folder: Callable[..., Path]) -> None:
    path = change_tensors(folder(), model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelFileError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing from the 29"):
        load(path)


def test_a_tensor_of_another_shape_is_named(folder: Callable[..., Path]) -> None:
    path = change_tensors(folder(), model__norm__weight=torch.ones(47))
    with pytest.raises(ModelFileError, match=r"tensor 'model\.norm\.weight' has shape \[47\]; expected \[48\]"):
        load(path)


def test_a_tensor_of_a_type_that_cannot_be_read_is_named(folder: Callable[..., Path]) -> None:
    path = change_tensors(folder(), model__norm__weight=torch.ones(48, dtype=torch.int8))
    with pytest.raises(ModelFileError, match=r"'model\.norm\.weight' is stored as I8; F32, F16, BF16 can be read"):
        load(path)


def test_a_tensor_that_the_family_does_not_have_is_refused(folder: Callable[..., Path]) -> None:
    path = change_tensors(folder(), model__layers__0__self_attn__q_proj__bias=torch.ones(48))
    with pytest.raises(ModelFileError, match=r"q_proj\.bias' has no place in this architecture"):
        load(path)


def test_rotary_frequencies_that_old_files_hold_are_passed_over(folder: Callable[..., Path]) -> None:
    load(change_tensors(folder(), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)))


def test_a_file_cut_short_is_refused(folder: Callable[..., Path]) -> None:
    path = folder()
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    for num_bytes in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:num_bytes])
        with pytest.raises(ModelFileError, match=r"model\.safetensors: cannot be read as safetensors; it is cut short"):
            load(path)


def test_a_foreign_file_is_refused(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").write_bytes(b"GGUF" * 1000)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(path)


def test_a_folder_without_weights_says_what_it_should_hold(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(path)


def test_a_missing_shard_is_named(folder: Callable[..., Path]) -> None:
    path = folder(shards=True)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        ModelFileError, match=rf"{shard.name}: is missing, though model\.safetensors\.index\.json names"
    ):
        load(path)


def change_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_that_contradict_their_index_are_refused(folder: Callable[..., Path]) -> None:
    path = folder(shards=True)
    change_index(path, lambda shard_of: shard_of.pop("model.norm.weight"))
    with pytest.raises(ModelFileError, match=r"tensor 'model\.norm\.weight' is in this shard, unlike"):
        load(path)
    change_index(path, lambda shard_of: shard_of.update({"model.norm.weight": shard_of["model.embed_tokens.weight"]}))
    with pytest.raises(ModelFileError, match=r"tensor 'model\.norm\.weight' is (missing from|in) this shard, unlike"):
        load(path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 7])
def test_a_shard_outside_the_folder_is_refused(folder: Callable[..., Path], shard: object) -> None:
    path = folder(shards=True)
    change_index(path, lambda shard_of: shard_of.update({"lm_head.weight": shard}))
    with pytest.raises(ModelFileError, match="expected the name of a file beside it"):
        load(path)


@pytest.mark.parametrize("content", ["", "[]", '{"architectures": ', "\xff", "[" * 100_000])
def test_a_damaged_configuration_is_refused(folder: Callable[..., Path], content: str) -> None:
    path = folder()
    (path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelFileError, match=r"config\.json: (cannot be read as JSON|should hold a JSON object)"):
        load(path)


def test_a_configuration_of_absurd_size_is_not_read(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "config.json").write_text(" " * (2 << 20))
    with pytest.raises(ModelFileError, match="has 2097152 bytes; the most that is read is"):
        load(path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json: is missing from the model's folder"):
        load(tmp_path)
