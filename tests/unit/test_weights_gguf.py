"""A Llama is loaded from a GGUF file whole and right, or refused with the name of what is wrong."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from services.common.model.errors import ModelFileError
from services.common.model.ggml_types import F16, F32
from services.common.model.gguf import read_gguf
from services.worker.runner.models.decoder_weights import DecoderWeights
from services.worker.weights.gguf_decoder import open_gguf_decoder
from services.worker.weights.load_decoder import load_decoder
from tests.unit.gguf_files import ARRAY, STRING, U32, Value, gguf_bytes
from tests.unit.gguf_files import F32 as FLOAT
from tests.unit.kept_matrix import KeptMatrix

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16, 24, 4, 2, 4, 10
Array = npt.NDArray[np.float32]

METADATA: Mapping[str, Value] = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, HIDDEN),
    "llama.feed_forward_length": (U32, INTERMEDIATE),
    "llama.attention.head_count": (U32, HEADS),
    "llama.attention.head_count_kv": (U32, KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": (FLOAT, 1e-5),
    "llama.rope.freq_base": (FLOAT, 10000.0),
}
SHAPES = {
    "token_embd.weight": (VOCABULARY, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
    "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
}


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    folder: Path, tensors: Mapping[str, Array], changed: Mapping[str, Value | None] | None = None, kind: int = F32
) -> Path:
    """Write a file with these tensors; `changed` replaces metadata, or takes it away where None."""
    metadata = {key: value for key, value in {**METADATA, **(changed or {})}.items() if value is not None}
    stored = {
        name: (array.shape[::-1], kind, array.astype(np.float16 if kind == F16 else np.float32).tobytes())
        for name, array in tensors.items()
    }
    path = folder / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, stored))
    return path


def load(path: Path, progress: list[float] | None = None) -> DecoderWeights[KeptMatrix]:
    on_progress = (progress if progress is not None else []).append
    return load_decoder(open_gguf_decoder(read_gguf(path)), KeptMatrix, on_progress)


def matrix_of(linear: object) -> list[list[float]]:
    assert isinstance(linear, KeptMatrix)
    rows: list[list[float]] = linear.weight.tolist()
    return rows


def test_every_tensor_comes_to_its_place(tmp_path: Path) -> None:
    stored = tensors_of(SHAPES)
    progress: list[float] = []
    weights = load(write(tmp_path, stored), progress)
    (layer,) = weights.layers
    assert weights.embedding.tolist() == stored["token_embd.weight"].tolist()
    assert weights.norm.tolist() == stored["output_norm.weight"].tolist()
    assert layer.attention_norm.tolist() == stored["blk.0.attn_norm.weight"].tolist()
    assert layer.mlp_norm.tolist() == stored["blk.0.ffn_norm.weight"].tolist()
    assert matrix_of(layer.qkv_proj) == [
        *stored["blk.0.attn_q.weight"].tolist(),
        *stored["blk.0.attn_k.weight"].tolist(),
        *stored["blk.0.attn_v.weight"].tolist(),
    ]
    assert matrix_of(layer.o_proj) == stored["blk.0.attn_output.weight"].tolist()
    assert matrix_of(layer.gate_up_proj) == [
        *stored["blk.0.ffn_gate.weight"].tolist(),
        *stored["blk.0.ffn_up.weight"].tolist(),
    ]
    assert matrix_of(layer.down_proj) == stored["blk.0.ffn_down.weight"].tolist()
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_without_an_output_matrix_the_embedding_is_used(tmp_path: Path) -> None:
    stored = tensors_of(SHAPES)
    assert matrix_of(load(write(tmp_path, stored)).lm_head) == stored["token_embd.weight"].tolist()


def test_an_output_matrix_of_its_own_is_used(tmp_path: Path) -> None:
    stored = tensors_of({**SHAPES, "output.weight": (VOCABULARY, HIDDEN)})
    assert matrix_of(load(write(tmp_path, stored)).lm_head) == stored["output.weight"].tolist()


def test_half_precision_is_read_too(tmp_path: Path) -> None:
    stored = tensors_of(SHAPES)
    weights = load(write(tmp_path, stored, kind=F16))
    assert weights.norm.tolist() == stored["output_norm.weight"].astype(np.float16).astype(np.float32).tolist()


def test_a_weight_is_not_changed_by_the_next_one_loaded(tmp_path: Path) -> None:
    weights = load(write(tmp_path, tensors_of(SHAPES)))
    assert weights.lm_head.weight.tolist() == weights.embedding.tolist()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    stored = tensors_of({other: shape for other, shape in SHAPES.items() if other != name})
    with pytest.raises(ModelFileError, match=f"tensor '{name}' is missing"):
        load(write(tmp_path, stored))


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"token_embd.weight"}))
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    stored = tensors_of({**SHAPES, name: (shape[0] + 4, *shape[1:])})
    with pytest.raises(ModelFileError, match=rf"tensor '{name}' has shape \(.*\); expected \("):
        load(write(tmp_path, stored))


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, tensors_of(SHAPES))
    content = {name: (array.shape[::-1], F32, array.tobytes()) for name, array in tensors_of(SHAPES).items()}
    float64 = 28
    content["output_norm.weight"] = ((HIDDEN,), float64, bytes(8 * HIDDEN))
    path.write_bytes(gguf_bytes(METADATA, content))
    with pytest.raises(ModelFileError, match=r"'output_norm\.weight' is stored as F64; F32, F16, .* can be read"):
        load(path)


def test_a_tensor_that_a_llama_does_not_have_is_refused(tmp_path: Path) -> None:
    stored = tensors_of({**SHAPES, "blk.0.attn_q.bias": (HEADS * HEAD_DIM,)})
    with pytest.raises(ModelFileError, match=r"tensor 'blk\.0\.attn_q\.bias' has no place in this architecture"):
        load(write(tmp_path, stored))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"general.architecture": (STRING, "mamba")}, "the architecture is 'mamba'; this engine computes"),
        ({"llama.block_count": None}, "metadata key 'llama.block_count' is missing"),
        ({"llama.block_count": (U32, 0)}, "a size of the model is below 1"),
        ({"llama.attention.head_count": (U32, 0)}, "a size of the model is below 1"),
        ({"llama.attention.head_count": (U32, 3)}, "its heads do not divide what they share"),
        ({"llama.rope.scaling.type": (STRING, "yarn")}, "llama.rope.scaling.type is 'yarn'"),
        (
            {"llama.rope.dimension_count": (U32, 2)},
            "llama.rope.dimension_count is 2; this engine supports 4, the length of a key, only",
        ),
        ({"llama.block_count": (U32, 2)}, "tensor 'blk.1.attn_norm.weight' is missing"),
        (
            {"tokenizer.ggml.tokens": (ARRAY, (STRING, ["a", "b"]))},
            r"it has 2 tokens, but 'token_embd\.weight' has 10 rows",
        ),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(
    tmp_path: Path, changed: Mapping[str, Value | None], problem: str
) -> None:
    with pytest.raises(ModelFileError, match=problem):
        load(write(tmp_path, tensors_of(SHAPES), changed))


def test_more_layers_in_the_file_than_in_its_metadata_are_refused(tmp_path: Path) -> None:
    second = {name.replace("blk.0", "blk.1"): shape for name, shape in SHAPES.items() if name.startswith("blk.0")}
    with pytest.raises(ModelFileError, match=r"tensor 'blk.1.* has no place in this architecture"):
        load(write(tmp_path, tensors_of({**SHAPES, **second})))
