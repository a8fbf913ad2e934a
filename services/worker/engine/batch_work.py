"""Work of which only the end counts: all answers are to be there as soon as can be, none of their tokens is waited for.

Two rules, since what reads the weights for a few decodes could multiply some hundred rows in the same time:

- Who may write most begins first (longest processing time first: Graham, "Bounds on multiprocessing timing anomalies",
  1969, section 5). So at the end no long answer is left, for which step after step holds a few decodes only.
- Prompts are spread over the steps of those that decode, as in Sarathi-Serve (Agrawal et al., 2024), but for another
  reason: in as small parts as let nobody end behind the longest answer or, where those are larger than steps are
  filled up to, in full steps.

How much a sequence will write isn't known, but how much it may. If all may write the same, both rules do nothing: then
prompts are computed as fast as can be. So they are while others still come, who may be let in one by one by whom more
wait with: whatever is put off here would keep those waiting there.
"""

from collections.abc import Iterable

from services.worker.engine.limits import EngineLimits, least_size
from services.worker.engine.sequence import Sequence

LEAST_ROWS = 256
"""Of a step with prompts: a GPU multiplies about so many while it reads the weights. Answers that end sooner than they
might leave prompts waiting that were spread too thin; so none is spread thinner."""
LONGEST_ANSWER = 1024
"""Tokens that an answer is counted on for at most. A request that names no limit may fill its context, and next to none
does: prompts would be spread over thousands of steps that never come."""
PROMPT_TOKENS_A_STEP = 512
"""Prefilled, about, while each sequence writes a token: what makes one time of prompts and answers."""


def rank(sequence: Sequence) -> float:
    """Return a sequence's place in the order, the lowest first: when it has to begin, to end with those that came with
    it, in tokens prefilled.

    So who may write N tokens less than others is overtaken by those that come later for 512 N tokens at most.
    """
    return sequence.came_after_tokens - PROMPT_TOKENS_A_STEP * _answer_tokens(sequence)


def prefill_tokens(
    limits: EngineLimits, num_decodes: int, running: Iterable[Sequence], to_prefill: Iterable[Sequence]
) -> int:
    """Return how many tokens of prompts a step takes beside so many decodes: as few as let nobody end behind the
    longest answer, but what fills the step up. O(n log n).

    `to_prefill`: those to be prefilled, running or not. What of them is in the prefix cache counts as if it were not.
    """
    prompts = sorted(to_prefill, key=rank)
    writing = (sequence for sequence in (*running, *prompts) if not sequence.held)
    num_steps = max(map(_answer_tokens, writing), default=0)
    wanted, num_tokens = 0, 0
    for sequence in prompts:
        num_tokens += sequence.num_ready_tokens
        # The step that computes the last of a prompt writes the first token of the answer.
        wanted = max(wanted, -(-num_tokens // max(1, num_steps - _answer_tokens(sequence) + 1)))
    num_rows = _filled_up(limits, max(num_decodes + wanted, LEAST_ROWS))
    return min(limits.max_prefill_tokens_per_step, num_rows - num_decodes)


def _answer_tokens(sequence: Sequence) -> int:
    return min(sequence.num_tokens_left, LONGEST_ANSWER)


def _filled_up(limits: EngineLimits, num_rows: int) -> int:
    """Return a number of rows that takes no longer; more than the largest size: as many as can be."""
    if not limits.filled_up_to:
        return num_rows
    return least_size(limits.filled_up_to, num_rows) or num_rows + limits.max_prefill_tokens_per_step
