"""What a load's answers say together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.bench.answer import Answer

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a user expects (SLO). None: no limit."""

    ttft_ms: float | None = None
    """Longest time to the first token."""
    itl_ms: float | None = None
    """Longest pause between tokens, but for 1 in 100 of an answer's."""

    def met_by(self, answer: Answer) -> bool:
        """Whether one answer was as expected; a failed one never is."""
        if answer.error:
            return False
        if self.ttft_ms is not None and answer.time_to_first_token_s * 1000 > self.ttft_ms:
            return False
        pauses_s = answer.inter_token_s
        return self.itl_ms is None or not pauses_s or percentile(pauses_s, 99) * 1000 <= self.itl_ms


@dataclass(frozen=True, slots=True)
class Latency:
    """One latency over all that had it, in ms."""

    mean_ms: float
    percentiles_ms: Mapping[int, float]
    """By PERCENTILES."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A load's figures. Latencies are those of answers without error; None: there are none."""

    num_requests: int
    errors: Mapping[str, int]
    """Failed requests, by kind."""
    duration_s: float
    """From the first intended arrival to the last end."""
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    """Answered without error."""
    goodput_per_s: float
    """Requests answered as expected, a second."""
    good_share: float
    """Of all requests, failed ones included."""
    cached_share: float | None
    """Of prompts' tokens, those that the server found in its cache of prefixes. None: it does not say."""
    client_lag_ms: float
    """p99 of how late the client itself sent: far below the latencies, or the client is what was measured."""
    latencies: Mapping[str, Latency | None]
    """TTFT, ITL, TPOT and E2E."""


def latencies_s(answers: Sequence[Answer]) -> Mapping[str, Sequence[float]]:
    """TTFT, TPOT and E2E of each answer without error, and ITL of each of their pauses, in s."""
    whole = [answer for answer in answers if not answer.error]
    per_token = [answer.time_per_output_token_s for answer in whole]
    return {
        "TTFT": [answer.time_to_first_token_s for answer in whole],
        "ITL": [pause_s for answer in whole for pause_s in answer.inter_token_s],
        "TPOT": [each_s for each_s in per_token if each_s is not None],
        "E2E": [answer.end_to_end_s for answer in whole],
    }


def summarize(answers: Sequence[Answer], objective: Objective) -> Summary:
    """Put the answers of one load together. There is at least one."""
    whole = [answer for answer in answers if not answer.error]
    duration_s = max(answer.end_s for answer in answers) - min(answer.arrival_s for answer in answers)
    num_good = sum(objective.met_by(answer) for answer in answers)
    output_tokens = sum(answer.counts.output for answer in whole)
    return Summary(
        num_requests=len(answers),
        errors=dict(Counter(answer.error for answer in answers if answer.error)),
        duration_s=duration_s,
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s,
        requests_per_s=len(whole) / duration_s,
        goodput_per_s=num_good / duration_s,
        good_share=num_good / len(answers),
        cached_share=_cached_share(whole),
        client_lag_ms=percentile([answer.sent_s - answer.arrival_s for answer in answers], 99) * 1000,
        latencies={name: _latency(values) for name, values in latencies_s(answers).items()},
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent are, linear between the two nearest ranks (Hyndman and Fan's type 7)."""
    return float(np.percentile(values, percent))


def _cached_share(answers: Sequence[Answer]) -> float | None:
    told = [answer.counts for answer in answers if answer.counts.cached is not None]
    prompt_tokens = sum(counts.prompt for counts in told)
    return sum(counts.cached or 0 for counts in told) / prompt_tokens if prompt_tokens else None


def _latency(values_s: Sequence[float]) -> Latency | None:
    if not values_s:
        return None
    at = {percent: percentile(values_s, percent) * 1000 for percent in PERCENTILES}
    return Latency(float(np.mean(values_s)) * 1000, at)
