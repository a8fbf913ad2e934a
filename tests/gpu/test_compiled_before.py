"""No step of a worker takes a kernel in a form that was not compiled before it served.

The device is torch's `meta`, whose tensors have shapes and no values: which kernels are launched is written down, and
nothing is computed. Sizes are an 8B's.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.worker.cuda import cuda_runner, decoder, ranks
from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.decoder import DeviceDecoder, MostWork
from services.worker.cuda.dense_attention import DenseRun
from services.worker.cuda.kv_cache import DeviceKvCache
from services.worker.cuda.made_up_steps import GREEDY
from services.worker.cuda.matrix import ACTIVATIONS
from services.worker.cuda.ranks import DeviceRanks, MostRows
from services.worker.cuda.step_shapes import NEVER, FilledUpTo, chunk_sizes, decode_sizes
from services.worker.cuda.warm_up import compile_kernels
from services.worker.cuda.weights import DeviceWeights, dummy_weights
from services.worker.engine.block_pool import BlockId
from services.worker.engine.limits import EngineLimits
from services.worker.engine.sequence import SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.kernels import embedding
from services.worker.kernels.rows import FP8
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat
from tests.unit.engine_builders import limits_of

META = torch.device("meta")
CONFIG = DecoderConfig(2, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5)
BLOCK, PREFIX_BLOCKS = 64, 24
MOST_TOKENS = 8192
NUMBERS = (
    *(1, 2, 7, 8, 16, 17, 27, 28, 32, 33, 48, 64, 65, 96, 97),
    *(127, 128, 129, 160, 161, 224, 225, 256, 300, 511, 512),
)
"""Where forms begin and end."""


def weights_of(weights: DeviceWeightFormat, shard: Shard) -> DeviceWeights:
    generator = torch.Generator()
    with pytest.MonkeyPatch.context() as patch:
        # The device draws nothing, and has no generator of its own.
        patch.setattr(torch, "Generator", lambda device: generator)
        return dummy_weights(CONFIG, weights, shard, META)


def a_rank(world_size: int, most: MostWork, kind: torch.dtype) -> DeviceRanks:
    file: Any = SimpleNamespace(rank=0, world_size=world_size)
    return DeviceRanks(file, CONFIG, MostRows(most.num_rows, most.num_sequences, kind), META, has_nccl=True)


Launches = set[tuple[object, ...]]
"""Forms of the kernels that were launched."""


def _form(argument: object) -> object:
    """What a kernel is compiled for."""
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, int):
        return int, argument == 1, argument % 16 == 0
    return argument


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What is launched from now on; tensors are taken for a device's."""
    written = Launches()

    def run(kernel: Any, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        # The interpreter's kernels keep what they are told aside.
        told = vars(kernel).get("kwargs") or vars(kernel)
        unspecialized = told["do_not_specialize"] or ()
        given = [
            _form(argument) if name not in unspecialized else int
            for name, argument in zip(kernel.arg_names, arguments, strict=False)
        ]
        written.add((kernel.fn.__name__, *given, *sorted(options.items())))

    def addresses(_first: int, device: torch.device) -> Tensor:
        return torch.empty(1, dtype=torch.int64, device=device)

    def attended(queries: Tensor, _keys: Tensor, _values: Tensor, run: DenseRun) -> Tensor:
        return torch.empty_like(queries[run.rows])

    monkeypatch.setattr(type(embedding._embed), "run", run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *arguments, **options: None)
    monkeypatch.setattr(decoder, "dense_attention", attended)
    monkeypatch.setattr(CudaRunner, "_overlaps", lambda runner, rows: rows < cuda_runner._OVERLAPPED_BELOW_ROWS)
    monkeypatch.setattr(
        ranks, "share_memory", lambda num_bytes, file, device: SimpleNamespace(seat_addresses=addresses)
    )
    monkeypatch.setattr(ranks, "Nccl", lambda file: SimpleNamespace(sum=lambda product: None))
    # Nothing is read of what was not computed.
    monkeypatch.setattr(CudaRunner, "_read", lambda *arguments: SimpleNamespace(wait=lambda: None))
    return written


def a_chunk(number: int, first_position: int, num_tokens: int, *, is_decode: bool, is_scored: bool) -> SequenceChunk:
    num_blocks = -(-(first_position + num_tokens) // BLOCK)
    own = range(1000 * number, 1000 * number + num_blocks)
    shared = range(min(PREFIX_BLOCKS, num_blocks - 1) if is_decode else 0)
    table = tuple(map(BlockId, (*shared, *own[len(shared) :])))
    sampled = (GREEDY, 5 if is_decode else 0, (0,) if is_scored else ())
    return SequenceChunk(SequenceId(-number), (0,) * num_tokens, first_position, table, *sampled)


def a_step(num_decodes: int, prompts: list[int], *, shares: bool = False, is_scored: bool = False) -> StepPlan:
    position = PREFIX_BLOCKS * BLOCK + 7 if shares else 3
    chunks = [a_chunk(n, position, 1, is_decode=True, is_scored=False) for n in range(1, num_decodes + 1)]
    chunks += [
        a_chunk(1000 + n, 0, num_tokens, is_decode=False, is_scored=is_scored) for n, num_tokens in enumerate(prompts)
    ]
    return StepPlan(1, tuple(chunks))


def steps_within(limits: EngineLimits) -> Iterator[StepPlan]:
    most_prompts = limits.max_prefill_tokens_per_step
    for plan in steps_of(limits.max_sequences):
        if sum(len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1) <= most_prompts:
            yield plan


def steps_of(most: int) -> Iterator[StepPlan]:
    for num_decodes in sorted({*(number for number in NUMBERS if number < most), most - 1, most} - {0}):
        for shares in (False, True):
            yield a_step(num_decodes, [], shares=shares)
            if num_decodes < most:
                yield a_step(num_decodes, [9], shares=shares)
                yield a_step(num_decodes, [2400], shares=shares)
                for num_rows in (511, 512, 513):
                    # Where kernels no longer overlap.
                    if num_decodes + 1 < num_rows:
                        yield a_step(num_decodes, [num_rows - num_decodes], shares=shares)
                        yield a_step(num_decodes, [num_rows - num_decodes], shares=shares, is_scored=True)
    for num_rows in (*(number for number in NUMBERS if number > 1), 700, 2400, 4096, MOST_TOKENS):
        for is_scored in (False, True):
            yield a_step(0, [num_rows], is_scored=is_scored)
            if most > 1:
                yield a_step(1, [num_rows - 1] if num_rows > 2 else [2], is_scored=is_scored)
            if most > 20 <= num_rows:
                # More prompts than a graph has room for.
                yield a_step(0, [num_rows // 20] * 20, is_scored=is_scored)


@pytest.mark.parametrize(
    ("weights", "has_fp8_cache", "max_sequences", "most_prompts", "has_graphs", "is_batch_invariant", "world_size"),
    [
        ("bf16", False, 256, MOST_TOKENS, True, False, 1),
        ("bf16", True, 128, MOST_TOKENS, True, False, 1),
        ("bf16", True, 256, 300, True, False, 1),
        ("bf16", False, 100, MOST_TOKENS, False, False, 1),
        ("bf16", False, 40, MOST_TOKENS, False, True, 1),
        ("bf16", True, 20, MOST_TOKENS, True, True, 1),
        ("fp8", False, 20, MOST_TOKENS, True, False, 1),
        ("fp8", True, 600, MOST_TOKENS, True, False, 1),
        ("fp8", True, 600, 300, True, False, 1),
        ("fp8", True, 300, 400, False, False, 1),
        ("fp8", False, 1, MOST_TOKENS, True, False, 1),
        ("bf16", False, 64, MOST_TOKENS, True, False, 2),
        ("fp8", False, 20, MOST_TOKENS, True, False, 4),
    ],
)
def test_whatever_a_step_launches_was_compiled_before(
    weights: DeviceWeightFormat,
    has_fp8_cache: bool,
    max_sequences: int,
    most_prompts: int,
    has_graphs: bool,
    is_batch_invariant: bool,
    world_size: int,
    launches: Launches,
) -> None:
    kind, shard = ACTIVATIONS[weights], Shard(0, world_size)
    config = shard.config(CONFIG)
    most = MostWork(most_prompts + max_sequences, max_sequences, 2 * max_sequences, CONFIG.context_tokens)
    model = DeviceDecoder(
        CONFIG,
        weights_of(weights, shard),
        shard,
        most,
        kind,
        a_rank(world_size, most, kind) if world_size > 1 else None,
        is_batch_invariant=is_batch_invariant,
    )
    model.may_be_dense = not is_batch_invariant
    chunks = tuple(size for size in chunk_sizes(most.num_rows) if model.ranks is None or model.ranks.are_few(size))
    filled_up_to = FilledUpTo(decode_sizes(max_sequences), chunks) if has_graphs else NEVER
    limits = limits_of(
        num_blocks=1,
        block_size_tokens=BLOCK,
        max_sequences=max_sequences,
        max_prefill_tokens_per_step=most_prompts,
        context_tokens=CONFIG.context_tokens,
    )

    def a_runner(filled_up_to: FilledUpTo) -> CudaRunner:
        cache = DeviceKvCache(config, 1, BLOCK, FP8 if has_fp8_cache else kind, META)
        return CudaRunner(model, cache, most, filled_up_to)

    compile_kernels(a_runner(NEVER), a_runner(filled_up_to), limits, threads=1)
    compiled = {*launches}
    launches.clear()
    runner = a_runner(filled_up_to)
    for step in steps_within(limits):
        runner.launch(step)
        assert launches <= compiled, [(len(chunk.token_ids), chunk.first_position) for chunk in step.chunks][-3:]
    assert len(launches) > 5
