"""What one request saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.bench.target import TokenCounts


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's times, in s since the load's start, on the client's clock.

    Every latency begins at the intended arrival, not when the request was sent: what a client that is behind, or a
    server that does not take calls, costs the user is counted (no coordinated omission).
    """

    arrival_s: float
    sent_s: float
    message_s: Sequence[float]
    """When each message with tokens came."""
    end_s: float
    counts: TokenCounts
    error: str = ""
    """Kind of failure; empty: none."""
    error_text: str = ""
    """In the server's words."""

    @property
    def time_to_first_token_s(self) -> float:
        """From the intended arrival to the first message with tokens. For answers without error only."""
        return self.message_s[0] - self.arrival_s

    @property
    def end_to_end_s(self) -> float:
        """From the intended arrival to the end."""
        return self.end_s - self.arrival_s

    @property
    def inter_token_s(self) -> list[float]:
        """Pauses between successive messages with tokens, as a reader sees them: tokens that come together are one."""
        return [later - earlier for earlier, later in pairwise(self.message_s)]

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of a token after the first; None: there is but one."""
        if self.counts.output < 2:
            return None
        return (self.message_s[-1] - self.message_s[0]) / (self.counts.output - 1)
