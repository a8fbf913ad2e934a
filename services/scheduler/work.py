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
    """How fast a full worker is, and how much it holds, as workers tell it; in plain numbers: they are read often."""

    fixed_ms: float
    ms_per_token: float
    ms_per_attended_token: float
    max_prefill_tokens_per_step: int
    max_sequences: int
    num_blocks: int
    block_size_tokens: int

    @staticmethod
    def of(step_time: StepTime, worker: WorkerInfo) -> "Pace":
        """Pace of workers whose steps take this, and that hold as much as this one."""
        return Pace(
            fixed_ms=step_time.fixed_ms,
            ms_per_token=step_time.ms_per_token,
            ms_per_attended_token=step_time.ms_per_attended_token,
            max_prefill_tokens_per_step=max(1, worker.max_prefill_tokens_per_step),
            max_sequences=max(1, worker.max_sequences),
            num_blocks=max(1, worker.num_blocks),
            block_size_tokens=max(1, worker.block_size_tokens),
        )

    def request_ms(self, needs: Reservation, num_tokens: float) -> float:
        """Computing a request's prompt, and so many further tokens of each choice, from beginning to end."""
        return self._prefill_ms(needs.prefill_tokens) + self._decode_ms(needs, num_tokens)

    def share(self, needs: Reservation) -> float:
        """Which part of a worker it fills while it runs: of its sequences or of its cache, whichever is more."""
        blocks = needs.num_blocks(self.block_size_tokens) / self.num_blocks
        return max(needs.num_choices / self.max_sequences, blocks)

    def _prefill_ms(self, num_tokens: int) -> float:
        """In steps that are full of prompts: it bears its part of what a step takes anyhow."""
        steps = num_tokens / self.max_prefill_tokens_per_step
        return self._steps_ms(steps, num_tokens, num_tokens * (num_tokens + 1) / 2)

    def _decode_ms(self, needs: Reservation, num_tokens: float) -> float:
        """In steps that are as full as the cache allows with requests like this one."""
        tokens = needs.num_choices * num_tokens
        attended = tokens * (needs.prefill_tokens + num_tokens / 2)
        return self._steps_ms(num_tokens * self.share(needs), tokens, attended)

    def _steps_ms(self, steps: float, tokens: float, attended: float) -> float:
        return steps * self.fixed_ms + tokens * self.ms_per_token + attended * self.ms_per_attended_token


def mean_step_time(accounts: Iterable[Account], last: StepTime | None) -> StepTime | None:
    """The mean of what workers' steps take; `last` while none has made a step."""
    times = [account.step_time for account in accounts if account.step_time is not None]
    if not times:
        return last
    return StepTime(
        fixed_ms=sum(time.fixed_ms for time in times) / len(times),
        ms_per_token=sum(time.ms_per_token for time in times) / len(times),
        ms_per_attended_token=sum(time.ms_per_attended_token for time in times) / len(times),
    )


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
