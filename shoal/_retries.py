"""When a call is tried again, after how long, and when it is given up."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import Cancelled, DeadlineExceeded, Exhausted, Internal, ShoalError, Unavailable

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of retrying. The delay before try k is random up to `first_delay_s` * 2^k, and at most `longest_delay_s`.

    `outage_limit_s`: a call is given up after so long an outage in all without a new token.
    `retry_exhausted`: also wait, as long as the fleet says, when its queue is full; else `Exhausted` is raised at once.
    """

    outage_limit_s: float = 30.0
    first_delay_s: float = 0.05
    longest_delay_s: float = 2.0
    retry_exhausted: bool = False


class Outage:
    """How long one call has been without a gateway that serves it. Owned by the call."""

    def __init__(self, policy: RetryPolicy, clock: Clock, rng: random.Random) -> None:
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._tries = 0
        self._earlier_s = 0.0
        self._since: float | None = None

    def delay_after(self, error: ShoalError, *, unary: bool = False) -> float:
        """How long to wait before the next try, in seconds. Raises the error if there shall be none."""
        if not self._may_pass(error, unary):
            raise error
        now = self._clock()
        if self._since is None:
            self._since = now
        left_s = self._policy.outage_limit_s - self._earlier_s - (now - self._since)
        if left_s <= 0:
            raise error
        delay_s = self._rng.uniform(0, min(self._policy.longest_delay_s, self._policy.first_delay_s * 2**self._tries))
        self._tries = min(self._tries + 1, 30)
        return min(delay_s + error.retry_after_ms / 1000, left_s)

    def answered(self) -> None:
        """A gateway serves the call. The time lost still counts, or accepting and failing could go on for ever."""
        if self._since is not None:
            self._earlier_s += self._clock() - self._since
            self._since = None

    def progressed(self) -> None:
        """Tokens came: the outage is over."""
        self._tries, self._earlier_s, self._since = 0, 0.0, None

    def _may_pass(self, error: ShoalError, unary: bool) -> bool:
        if isinstance(error, Unavailable):
            return True
        if isinstance(error, Exhausted):
            return self._policy.retry_exhausted and error.retry_after_ms > 0
        # A gateway that dies or is frozen also shows as one of these; what a gateway says itself has a reason.
        if isinstance(error, Internal | Cancelled):
            return not error.reason
        return unary and isinstance(error, DeadlineExceeded) and not error.reason
