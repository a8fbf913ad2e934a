"""What requests cost: milliseconds of one worker that is full, by the step times that workers report."""

from collections.abc import Iterable
from dataclasses import dataclass

from gen.shoal.fleet.v1.request_pb2 import StepTime, WorkerInfo, WorkerReport
from services.common.ids import WorkerId
from services.scheduler.ledger import Account, Reservation

UNKNOWN_ANSWER_TOKENS = 256
"""Taken for the length of an answer until some have ended; what may be asked for at most says little of it."""
LENGTHS_MEMORY = 0.9
"""The mean keeps this share of its weight with each later look that saw answers end."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a full worker is, and how much it holds."""

    step_time: StepTime
    worker: WorkerInfo

    def request_ms(self, needs: Reservation, num_tokens: float) -> float:
        """Computing a request's prompt, and so many further tokens of each choice, from beginning to end."""
        return self._prefill_ms(needs.prefill_tokens) + self._decode_ms(needs, num_tokens)

    def share(self, needs: Reservation) -> float:
        """Which part of a worker it fills while it runs: of its sequences or of its cache, whichever is more."""
        blocks = needs.num_blocks(max(1, self.worker.block_size_tokens)) / max(1, self.worker.num_blocks)
        return max(needs.num_choices / max(1, self.worker.max_sequences), blocks)

    def _prefill_ms(self, num_tokens: int) -> float:
        """In steps that are full of prompts: it bears its part of what a step takes anyhow."""
        steps = num_tokens / max(1, self.worker.max_prefill_tokens_per_step)
        return self._steps_ms(steps, num_tokens, num_tokens * (num_tokens + 1) / 2)

    def _decode_ms(self, needs: Reservation, num_tokens: float) -> float:
        """In steps that are as full as the cache allows with requests like this one."""
        tokens = needs.num_choices * num_tokens
        attended = tokens * (needs.prefill_tokens + num_tokens / 2)
        return self._steps_ms(num_tokens * self.share(needs), tokens, attended)

    def _steps_ms(self, steps: float, tokens: float, attended: float) -> float:
        cost = self.step_time
        return steps * cost.fixed_ms + tokens * cost.ms_per_token + attended * cost.ms_per_attended_token


def mean_pace(accounts: Iterable[Account], last: Pace | None) -> Pace | None:
    """The mean of workers' step times, with the room of the smallest; `last` while none has made a step."""
    known = [account for account in accounts if account.step_time is not None]
    if not known:
        return last
    times = [account.step_time for account in known if account.step_time is not None]
    mean = StepTime(
        fixed_ms=sum(time.fixed_ms for time in times) / len(times),
        ms_per_token=sum(time.ms_per_token for time in times) / len(times),
        ms_per_attended_token=sum(time.ms_per_attended_token for time in times) / len(times),
    )
    return Pace(mean, smallest(account.info for account in known))


def smallest(workers: Iterable[WorkerInfo]) -> WorkerInfo:
    """The worker whose cache holds fewest tokens. Raises ValueError if there is none."""
    return min(workers, key=lambda worker: worker.num_blocks * worker.block_size_tokens)


class AnswerLengths:
    """How many tokens a choice has in the end, learned from what workers report. Changed by the leader's task only."""

    def __init__(self, mean_tokens: float = 0.0) -> None:
        """`mean_tokens`: what an earlier leader had learned; 0: nothing."""
        self.mean_tokens = mean_tokens
        self._seen: dict[WorkerId, tuple[int, int]] = {}

    def look(self, reports: Iterable[WorkerReport]) -> None:
        """Take in the last report of every worker. O(workers)."""
        before, self._seen = self._seen, {}
        num_choices = num_tokens = 0
        for report in reports:
            worker, ended = WorkerId(report.worker_id), (report.ended_choices, report.ended_choice_tokens)
            choices_before, tokens_before = before.get(worker, (0, 0))
            self._seen[worker] = ended
            num_choices += ended[0] - choices_before
            num_tokens += ended[1] - tokens_before
        if num_choices > 0:
            keep = LENGTHS_MEMORY**num_choices if self.mean_tokens else 0.0
            self.mean_tokens = keep * self.mean_tokens + (1 - keep) * num_tokens / num_choices

    def expected_tokens(self, needs: Reservation) -> float:
        """Tokens that each choice is expected to have still to generate; at least 1."""
        whole = min(float(needs.max_tokens), self.mean_tokens or UNKNOWN_ANSWER_TOKENS)
        return max(1.0, whole - needs.generated_tokens / needs.num_choices)
