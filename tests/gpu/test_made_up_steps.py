"""What a worker computes before it serves is as long as what will be asked of it."""

import pytest

from services.worker.cuda.made_up_steps import every_kind, largest, usual
from tests.unit.engine_builders import limits_of


@pytest.mark.parametrize(
    ("max_sequences", "most_tokens", "context_tokens", "num_rows"),
    [
        (256, 8192, 8192, 8192 + 255),
        # A context is shorter than a step: several prompts fill it.
        (256, 8192, 2048, 8192 + 252),
        (256, 8192, 3000, 8192 + 253),
        # So few sequences do not.
        (3, 8192, 2048, 3 * 2048),
        (1, 64, 128, 64),
    ],
)
def test_kernels_of_the_longest_steps_are_compiled_beforehand(
    max_sequences: int, most_tokens: int, context_tokens: int, num_rows: int
) -> None:
    limits = limits_of(
        num_blocks=1,
        max_sequences=max_sequences,
        max_prefill_tokens_per_step=most_tokens,
        context_tokens=context_tokens,
    )
    step = largest(limits)
    assert step.num_tokens == num_rows
    assert len(step.chunks) <= max_sequences
    assert max(len(chunk.token_ids) for chunk in step.chunks) <= context_tokens
    assert max(plan.num_tokens for plan in every_kind(limits)) == num_rows


@pytest.mark.parametrize("max_sequences", [1, 2, 6, 300])
@pytest.mark.parametrize("context_tokens", [16, 64, 4096])
def test_no_made_up_step_is_larger_than_any_that_there_is_room_for(max_sequences: int, context_tokens: int) -> None:
    limits = limits_of(
        num_blocks=1, max_sequences=max_sequences, max_prefill_tokens_per_step=64, context_tokens=context_tokens
    )
    for plan in (*every_kind(limits), *usual(limits)):
        assert 0 < len(plan.chunks) <= max_sequences
        assert max(chunk.context_tokens for chunk in plan.chunks) <= context_tokens
        assert plan.num_tokens <= 64 + max_sequences
