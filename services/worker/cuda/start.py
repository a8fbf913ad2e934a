"""Starts a runner on a device: weights, room for a step, a KV cache of what is left, graphs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.common.config import ConfigError
from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.decoder import DeviceDecoder, MostWork
from services.worker.cuda.kv_cache import DeviceKvCache
from services.worker.cuda.made_up_steps import largest
from services.worker.cuda.matrix import ACTIVATIONS
from services.worker.cuda.ranks import DeviceRanks, MostRows
from services.worker.cuda.step_shapes import NEVER, FilledUpTo, chunk_sizes, decode_sizes
from services.worker.cuda.warm_up import compile_kernels
from services.worker.cuda.weights import DeviceWeights
from services.worker.engine.limits import EngineLimits
from services.worker.kernels.prefill_attention import MOST_SHARING_HEADS
from services.worker.kernels.rows import FP8
from services.worker.kernels.tile_product import COPY_BYTES, fits
from services.worker.rank_file import RankFile
from services.worker.runner.cache_blocks import kv_block_bytes
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How a device is used."""

    weights: DeviceWeightFormat = "bf16"
    has_fp8_cache: bool = False
    block_size_tokens: int = 64
    max_sequences: int = 256
    max_prefill_tokens_per_step: int = 8192
    step_budget_ms: float | None = 50.0
    """As of `EngineLimits`."""
    context_tokens: int = 8192
    """Most tokens of a sequence; not more than the model's."""
    memory_share: float = 0.92
    """Of the device's memory: what may be taken, weights and all."""
    num_blocks: int | None = None
    """Of the KV cache; None: what the rest of the memory holds."""
    has_graphs: bool = True
    is_batch_invariant: bool = False
    """Whether a sequence's tokens are the same, whatever else is in its steps."""
    has_dense_attention: bool = True
    """Whether cuDNN attends whole prompts: faster, but its plan for each new shape takes longer than a step."""

    @property
    def kv_dtype(self) -> torch.dtype:
        """The type of keys and values in the cache."""
        return FP8 if self.has_fp8_cache else ACTIVATIONS[self.weights]


def start_cuda_runner(
    config: DecoderConfig,
    load: Callable[[], DeviceWeights],
    shard: Shard,
    options: DeviceOptions,
    device: torch.device,
    file: RankFile | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[EngineLimits, CudaRunner]:
    """Make a runner of the weights that `load` gives, a rank's part of them. `file`: what several ranks share;
    `on_stage` hears what is being done.

    The KV cache has as many blocks as fit into what a step of the largest size leaves, which is made to see; of ranks,
    the one with least room says how many. Raises ConfigError if that is not one, if the model cannot be dealt out, if
    its heads are not attended with, if the batch-invariant mode does not take it, or if ranks cannot reach each other,
    and NcclError.
    """
    rank_config = shard.config(config)
    _check_heads(rank_config, options.kv_dtype)
    context_tokens = min(options.context_tokens, config.context_tokens)
    most = MostWork(
        num_rows=options.max_prefill_tokens_per_step + options.max_sequences,
        num_sequences=options.max_sequences,
        num_places=2 * options.max_sequences,
        context_tokens=context_tokens,
    )
    weights, kind = load(), ACTIVATIONS[options.weights]
    if options.is_batch_invariant:
        _check_invariant(weights, kind)
    ranks = _join_ranks(file, config, most, options, device) if file else None
    model = DeviceDecoder(config, weights, shard, most, kind, ranks, is_batch_invariant=options.is_batch_invariant)
    model.may_be_dense &= options.has_dense_attention
    filled_up_to = _filled_up_to(options, most, ranks)

    def runner_with(num_blocks: int, filled_up_to: FilledUpTo = NEVER, *, captures: bool = False) -> CudaRunner:
        cache = DeviceKvCache(rank_config, num_blocks, options.block_size_tokens, options.kv_dtype, device)
        return CudaRunner(model, cache, most, filled_up_to, captures=captures)

    def limits_with(num_blocks: int) -> EngineLimits:
        return EngineLimits(
            num_blocks=num_blocks,
            block_size_tokens=options.block_size_tokens,
            max_sequences=options.max_sequences,
            max_prefill_tokens_per_step=options.max_prefill_tokens_per_step,
            step_budget_ms=options.step_budget_ms,
            context_tokens=context_tokens,
            vocabulary_size=config.vocabulary_size,
            filled_up_to=filled_up_to.chunks,
        )

    if device.type == "cuda":
        on_stage("compiling kernels")
        with model.with_few_layers():
            compile_kernels(runner_with(1), runner_with(1, filled_up_to), limits_with(1), torch.get_num_threads())
        if file:
            # The first step waits for other ranks in kernels, which do so for seconds only.
            file.board.exchange(b"compiled")
    num_blocks = options.num_blocks
    if num_blocks is None:
        block_bytes = kv_block_bytes(rank_config, options.block_size_tokens, options.kv_dtype)
        num_blocks = _measured_bytes_left(runner_with(1), limits_with(1), options, device) // block_bytes
        if file:
            num_blocks = min(int(told) for told in file.board.exchange(str(num_blocks).encode()))
        if num_blocks < 1:
            raise ConfigError(f"{options.memory_share} of the device's memory leave no room for a block of KV cache")
    runner = runner_with(num_blocks, filled_up_to, captures=device.type == "cuda" and options.has_graphs)
    return limits_with(num_blocks), runner


def _filled_up_to(options: DeviceOptions, most: MostWork, ranks: DeviceRanks | None) -> FilledUpTo:
    if not options.has_graphs:
        return NEVER
    # Sums of more rows are NCCL's, and were not measured in a graph with prompts.
    chunks = (size for size in chunk_sizes(most.num_rows) if ranks is None or ranks.are_few(size))
    return FilledUpTo(decode_sizes(options.max_sequences), tuple(chunks))


def _check_heads(config: DecoderConfig, kv_dtype: torch.dtype) -> None:
    key_bytes, group = config.head_dim * kv_dtype.itemsize, config.num_heads // config.num_kv_heads
    if key_bytes % COPY_BYTES:
        raise ConfigError(
            f"a key of the model's heads takes {key_bytes} bytes; on a GPU it is to fill multiples of {COPY_BYTES}"
        )
    if group > MOST_SHARING_HEADS:
        raise ConfigError(f"{group} query heads share a key head; on a GPU at most {MOST_SHARING_HEADS} can")


def _check_invariant(weights: DeviceWeights, kind: torch.dtype) -> None:
    layer = weights.layers[0]
    for matrix in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj, weights.lm_head):
        if not fits(matrix.values, kind):
            num_outputs, num_inputs = matrix.values.shape
            raise ConfigError(
                f"the batch-invariant mode does not take a matrix of {num_outputs} x {num_inputs}: inputs and outputs "
                "must fill multiples of 16 bytes"
            )


def _join_ranks(
    file: RankFile, config: DecoderConfig, most: MostWork, options: DeviceOptions, device: torch.device
) -> DeviceRanks:
    # Two of one number have one device, or one of two hosts; ranks are of one host.
    own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    devices = {told.decode() for told in file.board.exchange(own.encode())}
    has_own_device = len(devices) == file.world_size
    if not has_own_device and options.num_blocks is None:
        raise ConfigError("ranks that share a device cannot see how much of it is left for each: say --num-blocks")
    return DeviceRanks(
        file,
        config,
        MostRows(most.num_rows, most.num_sequences, ACTIVATIONS[options.weights]),
        device,
        # It refuses ranks that share a device; and what it adds up in which order goes by the number of rows.
        has_nccl=has_own_device and not options.is_batch_invariant,
    )


def _measured_bytes_left(runner: CudaRunner, limits: EngineLimits, options: DeviceOptions, device: torch.device) -> int:
    """Make a step of the largest size, on a cache of one block, and look what the device has left."""
    runner.launch(largest(limits)).result()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds but does not use would be given to the cache.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused - (1 - options.memory_share) * total)
