"""Steps that nobody asked for: to see what a step takes, in memory and in time, before the first request."""

from collections.abc import Iterator, Sequence

from services.worker.engine.block_pool import BlockId
from services.worker.engine.limits import EngineLimits
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SeenTokens, SequenceChunk, StepPlan

GREEDY = SamplingParameters()
_SHARED_TOKENS = 1024
"""Of a prefix that is worth reading once for some 20 decodes."""
ROWS_OF_FORMS = (7, 24, 48, 80, 112, 176, 240)
"""Rows that together have all forms of products of few rows."""
_USUAL_ROWS = (1024, 512, 256, 128)
"""Of steps with prompts whose times are taken at the start; what others take is thought to lie between."""
_DRAWN = SamplingParameters(temperature=1.0)
_CUT = SamplingParameters(
    temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, frequency_penalty=0.1, repetition_penalty=1.1,
    logit_bias=((0, 1.0),), num_logprobs=2,
)  # fmt: skip


def made_up_step(
    num_decodes: int,
    chunks: Sequence[int],
    block_size_tokens: int,
    sampling: SamplingParameters = GREEDY,
    cached_tokens: int = 0,
) -> StepPlan:
    """Decodes behind so many cached tokens, and chunks of so many tokens at the first position; all of them in block 0.

    With cached tokens the decodes share a prefix.
    """
    return StepPlan(
        0,
        tuple(
            SequenceChunk(
                SequenceId(-number),
                (0,) * num_tokens,
                first_position,
                (BlockId(0),) * -(-(first_position + num_tokens) // block_size_tokens),
                sampling,
                0,
                seen=SeenTokens((0,), (0,)) if sampling.has_penalties else None,
            )
            for number, (first_position, num_tokens) in enumerate(
                [*[(cached_tokens, 1)] * num_decodes, *((0, num_tokens) for num_tokens in chunks)], 1
            )
        ),
    )


def largest(limits: EngineLimits) -> StepPlan:
    """The step of most rows: prompts, of which a context shorter than a step takes several, and decodes."""
    whole, rest = divmod(limits.max_prefill_tokens_per_step, limits.longest_chunk_tokens)
    chunks = [*[limits.longest_chunk_tokens] * whole, *([rest] if rest else [])][: limits.max_sequences]
    return made_up_step(limits.max_sequences - len(chunks), chunks, limits.block_size_tokens)


def every_way_to_choose(limits: EngineLimits) -> Iterator[StepPlan]:
    """Steps that together take all that chooses tokens."""
    num_decodes = min(1, limits.max_sequences - 1)
    for sampling in (_DRAWN, _CUT, GREEDY):
        yield made_up_step(num_decodes, [min(2, limits.longest_chunk_tokens)], limits.block_size_tokens, sampling)


def every_kind(limits: EngineLimits) -> Iterator[StepPlan]:
    """Steps that together take every kernel, in every form, that steps within these limits take.

    Which one multiplies goes by the number of rows, of whole steps and of those that something is sampled after:
    `cuda/matrix.py`; whether it overlaps with the one in front as well.
    """
    most, max_sequences, size = limits.longest_chunk_tokens, limits.max_sequences, limits.block_size_tokens
    yield from every_way_to_choose(limits)
    for num_rows in ROWS_OF_FORMS:
        if num_rows <= most:
            yield made_up_step(0, [num_rows], size)
            if max_sequences > 1:
                # Beside decodes they do not overlap.
                yield made_up_step(1, [num_rows - 1], size)
    shared_tokens = -(-_SHARED_TOKENS // size) * size
    # Few rows, whose kernels overlap, and many.
    for num_tokens in sorted({min(100, most), min(600, most)}):
        for num_decodes in (6, 8, 47, 65, 128, 225):
            if num_decodes < max_sequences:
                yield made_up_step(num_decodes, [num_tokens], size)
        for num_decodes in (24, 100):
            if num_decodes < max_sequences and shared_tokens < limits.context_tokens:
                yield made_up_step(num_decodes, [num_tokens], size, cached_tokens=shared_tokens)
    yield made_up_step(max_sequences, [], size)
    # The longest have products of their own.
    yield largest(limits)


def usual(limits: EngineLimits) -> Iterator[StepPlan]:
    """Steps whose times tell what others take: chunks beside decodes, and decodes alone."""
    most, max_sequences, size = limits.longest_chunk_tokens, limits.max_sequences, limits.block_size_tokens
    beside = min(8, max_sequences - 1)
    for num_rows in (most, *_USUAL_ROWS):
        if beside + 2 <= num_rows <= most:
            yield made_up_step(beside, [num_rows - beside], size)
    for num_decodes in (64, 32, 16, 8, 4, 1):
        yield made_up_step(min(num_decodes, max_sequences), [], size)
