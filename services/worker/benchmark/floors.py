"""The least time that a step can take on one H200.

Of each of its operations: the larger of its bytes over the memory's read bandwidth and its flops over the peak, both as
measured (docs/gpu.md).
"""

from collections.abc import Sequence

from services.worker.benchmark.options import Engine
from services.worker.engine.step_plan import SequenceChunk, StepPlan

READ_BYTES_PER_S = 4.5e12
FLOPS_PER_S = {"float32": 5e13, "bf16": 7.8e14, "fp8": 1.31e15}
"""The best of copies, and of a product of 8192 x 8192 x 8192."""
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""A layer's, in their order."""


def floors_us(engine: Engine, plan: StepPlan) -> dict[str, float]:
    """Return the least time of all of a step's operations of a kind.

    Behind the last layer's attention only sampled rows count; keys and values that several decodes share, once.
    """
    config, options = engine.rank.config, engine.rank.options
    peak = FLOPS_PER_S[options.weights]

    def least(num_bytes: float, flops: float, flops_per_s: float = peak) -> float:
        return 1e6 * max(num_bytes / READ_BYTES_PER_S, flops / flops_per_s)

    floors: dict[str, float] = {}
    layer, head = engine.rank.weights.layers[0], engine.rank.weights.lm_head
    samples = sum(chunk.sample_index is not None for chunk in plan.chunks)
    for name in MATRICES:
        matrix = getattr(layer, name)
        of_a_row = 2.0 * matrix.values.numel()
        rows_of_last = plan.num_tokens if name == "qkv_proj" else samples
        floors[name] = (config.num_layers - 1) * least(matrix.num_bytes, plan.num_tokens * of_a_row)
        if rows_of_last:
            floors[name] += least(matrix.num_bytes, rows_of_last * of_a_row)
    if samples:
        floors["lm_head"] = least(head.num_bytes, 2.0 * samples * head.values.numel(), FLOPS_PER_S["bf16"])
    token_bytes = 2 * config.kv_size * options.kv_dtype.itemsize
    for name, chunks in (
        ("attention of decodes", [chunk for chunk in plan.chunks if len(chunk.token_ids) == 1]),
        ("attention of chunks", [chunk for chunk in plan.chunks if len(chunk.token_ids) > 1]),
    ):
        read = _distinct_tokens(chunks, options.block_size_tokens) * token_bytes
        flops = 4.0 * config.q_size * sum(chunk.num_attended_tokens for chunk in chunks)
        if chunks:
            floors[name] = config.num_layers * least(read, flops, FLOPS_PER_S["bf16"])
    return floors


def _distinct_tokens(chunks: Sequence[SequenceChunk], block_size_tokens: int) -> int:
    """Tokens of all contexts; blocks that several have, which are full, count once."""
    tables = [chunk.block_table for chunk in chunks]
    again = sum(map(len, tables)) - len(set().union(*tables))
    return sum(chunk.context_tokens for chunk in chunks) - again * block_size_tokens
