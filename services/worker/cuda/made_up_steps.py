"""Steps that nobody asked for: to see what a step takes, in memory and in time, before the first request."""

from collections.abc import Iterator, Sequence

from services.worker.engine.block_pool import BlockId
from services.worker.engine.limits import EngineLimits
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SeenTokens, SequenceChunk, StepPlan

GREEDY = SamplingParameters()
_SHARED_TOKENS = 1024
"""Of a prefix that is worth reading once for some 20 decodes."""
ROWS_OF_FORMS = (7, 24, 48, 80, 112, 144, 176, 240, 500)
"""Rows that together have all forms of kernels of few rows: of products, and of what reads them or sums them over
ranks."""
_MORE_ROWS = 520
"""Kernels of so many do not overlap. It is no length that cuDNN attends (`dense_attention`)."""
_DECODES_OF_FORMS = (1, 8, 23, 47, 65, 128, 225)
"""Decodes that together have all forms of their attention, and of the head's product."""
_USUAL_ROWS = (1024, 512, 256, 128)
"""Of steps with prompts whose times are taken at the start; what others take is thought to lie between."""
_SCORED = SamplingParameters(num_prompt_logprobs=1)
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
                # A prompt's first token or, of a decode, a later one: the batch-invariant mode attends otherwise then.
                int(number <= num_decodes),
                seen=SeenTokens((0,), (0,)) if sampling.has_penalties else None,
            )
            for number, (first_position, num_tokens) in enumerate(
                [*[(cached_tokens, 1)] * num_decodes, *((0, num_tokens) for num_tokens in chunks)], 1
            )
        ),
    )


def largest(limits: EngineLimits) -> StepPlan:
    """The step of most rows: prompts, of which a context shorter than a step takes several, and decodes."""
    chunks = _prompts(limits.max_prefill_tokens_per_step, limits.max_sequences, limits)
    return made_up_step(limits.max_sequences - len(chunks), chunks, limits.block_size_tokens)


def _prompts(num_tokens: int, most_prompts: int, limits: EngineLimits) -> list[int]:
    """Lengths of as few prompts as have so many tokens, or as many as there may be."""
    whole, rest = divmod(min(num_tokens, limits.max_prefill_tokens_per_step), limits.longest_chunk_tokens)
    return [*[limits.longest_chunk_tokens] * whole, *([rest] if rest else [])][:most_prompts]


def every_way_to_choose(limits: EngineLimits) -> Iterator[StepPlan]:
    """Steps that together take all that chooses tokens."""
    num_decodes = min(1, limits.max_sequences - 1)
    for sampling in (_DRAWN, _CUT, GREEDY):
        yield made_up_step(num_decodes, [min(2, limits.longest_chunk_tokens)], limits.block_size_tokens, sampling)


def every_kind(limits: EngineLimits) -> Iterator[StepPlan]:
    """Steps that together take every kernel, in every form, that steps within these limits take.

    Which one multiplies goes by the number of rows, of whole steps and of those that something is sampled after:
    `cuda/matrix.py`; whether it overlaps with the one in front as well. Decodes' attention goes by their number.
    """
    max_sequences, size = limits.max_sequences, limits.block_size_tokens
    yield from every_way_to_choose(limits)
    for num_rows in ROWS_OF_FORMS:
        yield made_up_step(0, _prompts(num_rows, max_sequences, limits), size)
        if max_sequences > 1:
            # Beside decodes the product behind attention does not overlap.
            yield made_up_step(1, _prompts(num_rows - 1, max_sequences - 1, limits), size)
    # The longest have products of their own.
    yield largest(limits)
    for num_rows in (*ROWS_OF_FORMS, limits.max_prefill_tokens_per_step):
        yield _scored(made_up_step(0, _prompts(num_rows, max_sequences, limits), size))
    # As few samples as overlap, in steps that do not: with decodes, if prompts alone are too short for it.
    beside = min(max(0, _MORE_ROWS - limits.max_prefill_tokens_per_step), max_sequences - 1)
    yield _scored(made_up_step(beside, _prompts(_MORE_ROWS - beside, max_sequences - beside, limits), size))
    yield _scored(largest(limits))
    shared_tokens = min(-(-_SHARED_TOKENS // size), (limits.context_tokens - 1) // size) * size
    for cached_tokens in (0, shared_tokens):
        for num_decodes in _decodes_of_forms(max_sequences):
            yield made_up_step(num_decodes, [], size, cached_tokens=cached_tokens)
        for num_decodes in _decodes_of_forms(max_sequences - 1):
            chunks = _prompts(_MORE_ROWS, max_sequences - num_decodes, limits)
            yield made_up_step(num_decodes, chunks, size, cached_tokens=cached_tokens)


def _scored(plan: StepPlan) -> StepPlan:
    """The step, asked for the log-probability of a token of its last prompt: all rows are kept to its end, and overlap
    there as few sampled ones do."""
    *others, last = plan.chunks
    return StepPlan(plan.step, (*others, last._replace(sampling=_SCORED, scored_token_ids=(0,))))


def _decodes_of_forms(most: int) -> list[int]:
    return sorted({min(number, most) for number in _DECODES_OF_FORMS}) if most else []


def usual(limits: EngineLimits) -> Iterator[StepPlan]:
    """Steps whose times tell what others take: chunks beside decodes, and decodes alone."""
    most, max_sequences, size = limits.longest_chunk_tokens, limits.max_sequences, limits.block_size_tokens
    beside = min(8, max_sequences - 1)
    for num_rows in (most, *_USUAL_ROWS):
        if beside + 2 <= num_rows <= most:
            yield made_up_step(beside, [num_rows - beside], size)
    for num_decodes in (64, 32, 16, 8, 4, 1):
        yield made_up_step(min(num_decodes, max_sequences), [], size)
