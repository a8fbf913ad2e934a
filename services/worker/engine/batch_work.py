"""Work of which only the end counts: all answers are to be there as soon as can be, none of their tokens is waited for.

Two rules, since what reads the weights for a few decodes could multiply some hundred rows in the same time:

- Who may write most begins first (longest processing time first: Graham, "Bounds on multiprocessing timing anomalies",
  1969, section 5). So at the end no long answer is left, for which step after step holds a few decodes only.
- Prompts are spread over the steps of those that decode, as in Sarathi-Serve (Agrawal et al., 2024), but for another
  reason: in as small parts as let nobody end behind the longest answer.

How much a sequence will write isn't known, but how much it may. If all may write the same, both rules do nothing: then
prompts are computed as fast as can be. So they are while others still come, who may be let in one by one by whom more
wait with: whatever is put off here would keep those waiting there.
"""

from bisect import bisect_left
from collections.abc import Iterable

from services.worker.engine.limits import EngineLimits
from services.worker.engine.sequence import Sequence

LEAST_ROWS = 256
"""Of a step with prompts: a GPU multiplies about so many while it reads the weights. Answers that end sooner than they
might leave prompts waiting that were spread too thin; so none is spread thinner."""
PROMPT_TOKENS_A_STEP = 512
"""Prefilled, about, while each sequence writes a token: what makes one time of prompts and answers."""


def latest_start(sequence: Sequence) -> float:
    """Return when a sequence has to begin, to end with those that came with it, in tokens prefilled. The lowest goes
    first.

    So who may write N tokens less than others is overtaken by those that come later for 512 N tokens at most.
    """
    return sequence.came_after_tokens - PROMPT_TOKENS_A_STEP * sequence.num_tokens_left


def prefill_tokens(
    limits: EngineLimits, num_decodes: int, running: Iterable[Sequence], to_prefill: Iterable[Sequence]
) -> int:
    """Return how many tokens of prompts a step takes beside so many decodes: as few as let nobody end behind the
    longest answer, but what fills the step up. `to_prefill`: those to be prefilled, running or not. O(n log n)."""
    prompts = sorted(to_prefill, key=latest_start)
    num_steps = max((sequence.num_tokens_left for sequence in (*running, *prompts)), default=0)
    wanted, num_tokens = 0, 0
    for sequence in prompts:
        num_tokens += sequence.num_ready_tokens
        # The step that computes the last of a prompt writes the first token of the answer.
        wanted = max(wanted, -(-num_tokens // max(1, num_steps - sequence.num_tokens_left + 1)))
    num_rows = _filled_up(limits, max(num_decodes + wanted, LEAST_ROWS))
    return min(limits.max_prefill_tokens_per_step, num_rows - num_decodes)


def _filled_up(limits: EngineLimits, num_rows: int) -> int:
    """Return a number of rows that takes no longer; more than the largest size: as many as can be."""
    sizes = limits.filled_up_to
    if not sizes:
        return num_rows
    index = bisect_left(sizes, num_rows)
    return sizes[index] if index < len(sizes) else num_rows + limits.max_prefill_tokens_per_step
