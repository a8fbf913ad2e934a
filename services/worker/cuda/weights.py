"""A decoder's weights on the device: out of files, or random ones of a shape."""

from dataclasses import replace

import torch
from torch import Tensor

from services.worker.cuda.matrix import ACTIVATIONS, DeviceMatrix, to_fp8
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights, DecoderWeights
from services.worker.runner.models.shard import Shard
from services.worker.runner.rotary_frequencies import rotary_frequencies
from services.worker.weight_format import DeviceWeightFormat
from services.worker.weights.load_decoder import Progress, load_decoder_as
from services.worker.weights.stored_decoder import Destination, StoredDecoder, Weight

DeviceWeights = DecoderWeights[DeviceMatrix]

_DUMMY_MAGNITUDE = 1e-3
"""As vLLM's dummy weights are drawn. Long steps are bound by power, which goes by the bits: 1 to 3 % of such a step."""


def load_weights(
    stored: StoredDecoder, weights: DeviceWeightFormat, shard: Shard, device: torch.device, on_progress: Progress
) -> DeviceWeights:
    """Load a rank's part onto the device; matrices are put together, and rounded to fp8, there and one at a time.

    Those of a model that is stored in fp8 stay as they are stored, or are multiplied with their scales. Raises
    ModelFileError, and ConfigError if the matrices cannot be dealt out.
    """
    kind, is_fp8 = ACTIVATIONS[weights], weights == "fp8"

    def matrix(weight: Weight, bias: Tensor | None) -> DeviceMatrix:
        if is_fp8 and weight.scales is None:
            return to_fp8(weight.values, bias)
        return DeviceMatrix(weight.values, weight.scales, bias)

    brought = replace(stored, tensors=stored.tensors.on(Destination(device, kind, keeps_fp8=is_fp8)))
    rank = load_decoder_as(brought, matrix, DeviceMatrix, on_progress, shard)
    return replace(rank, layers=tuple(_with_norms(layer, kind) for layer in rank.layers), norm=rank.norm.to(kind))


def dummy_weights(
    config: DecoderConfig, weights: DeviceWeightFormat, shard: Shard, device: torch.device
) -> DeviceWeights:
    """Make a rank's part of random weights, norms of one: as large as trained ones, and about as fast to compute with,
    where zeros would be faster.
    """
    config, vocabulary = shard.config(config), len(shard.vocabulary(config))
    kind = ACTIVATIONS[weights]
    generator = torch.Generator(device).manual_seed(0)

    def random(num_outputs: int, num_inputs: int) -> Tensor:
        values = torch.empty((num_outputs, num_inputs), dtype=kind, device=device)
        return values.uniform_(-_DUMMY_MAGNITUDE, _DUMMY_MAGNITUDE, generator=generator)

    def matrix(num_outputs: int, num_inputs: int) -> DeviceMatrix:
        values = random(num_outputs, num_inputs)
        return to_fp8(values) if weights == "fp8" else DeviceMatrix(values)

    hidden = config.hidden_size
    ones = torch.ones(hidden, dtype=kind, device=device)
    layers = tuple(
        DecoderLayerWeights(
            attention_norm=ones,
            qkv_proj=matrix(config.q_size + 2 * config.kv_size, hidden),
            qk_norm=None,
            o_proj=matrix(hidden, config.q_size),
            mlp_norm=ones,
            gate_up_proj=matrix(2 * config.intermediate_size, hidden),
            down_proj=matrix(hidden, config.intermediate_size),
        )
        for _ in range(config.num_layers)
    )
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    embedding = random(vocabulary, hidden)
    head = embedding if config.is_tied else random(vocabulary, hidden)
    return DecoderWeights(embedding, layers, ones, DeviceMatrix(head), frequencies)


def weights_bytes(config: DecoderConfig, weights: DeviceWeightFormat, shard: Shard) -> int:
    """Return the memory that a rank's weights take on its device, but for norms, biases and scales.

    `config` is the whole model's. Raises ConfigError if it cannot be dealt out.
    """
    layers = shard.config(config).num_layer_weights
    tables = (1 if config.is_tied else 2) * len(shard.vocabulary(config)) * config.hidden_size
    return layers * (1 if weights == "fp8" else ACTIVATIONS[weights].itemsize) + tables * ACTIVATIONS[weights].itemsize


def _with_norms(layer: DecoderLayerWeights[DeviceMatrix], kind: torch.dtype) -> DecoderLayerWeights[DeviceMatrix]:
    """Norms in the activations' type; the heads' stay in float32."""
    qk_norm = None if layer.qk_norm is None else layer.qk_norm.contiguous()
    return replace(
        layer, attention_norm=layer.attention_norm.to(kind), qk_norm=qk_norm, mlp_norm=layer.mlp_norm.to(kind)
    )
