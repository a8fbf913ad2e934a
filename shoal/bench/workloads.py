"""Named workloads: the same lengths, token ids and arrivals for every server that is measured.

A seed fixes everything. Ids are drawn evenly from [first_token, ordinary_tokens(vocabulary)): vocabularies keep their
special tokens at the end, so the top 1/501 of the ids (at least 8) is never drawn. A model with special ids elsewhere
is given a `first_token` above them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shoal.bench.ask import Ask

SHARED_PREFIXES, SHARED_PREFIX_TOKENS = 8, 2048
_ARRIVALS_STREAM = 1_000_003
WARM_UP_SEED = 1_000_000
"""Far from those that measure: what warms up is not to be in a cache."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of a workload's requests, in tokens. `shared_prefix`: number of the system prompt in front, or -1."""

    prompt_tokens: Counts
    output_tokens: Counts
    shared_prefix: Counts


def asks_of(workload: str, seed: int, vocabulary_tokens: int, first_token: int = 0) -> Iterator[Ask]:
    """Yield the requests of a workload, in order of arrival, all arriving at 0.

    Answers are exactly as long as the workload says, so the model's end token does not end them. Raises KeyError for an
    unknown name.
    """
    rng = np.random.default_rng([seed, sorted(WORKLOADS).index(workload)])
    lengths = WORKLOADS[workload](rng)
    last_token = ordinary_tokens(vocabulary_tokens)
    prefixes = rng.integers(first_token, last_token, size=(SHARED_PREFIXES, SHARED_PREFIX_TOKENS))
    own_tokens = lengths.prompt_tokens - np.where(lengths.shared_prefix >= 0, SHARED_PREFIX_TOKENS, 0)
    for index, own in enumerate(own_tokens):
        shared = int(lengths.shared_prefix[index])
        prefix = prefixes[shared].tolist() if shared >= 0 else []
        drawn = rng.integers(first_token, last_token, size=int(own)).tolist()
        yield Ask(token_ids=(*prefix, *drawn), max_tokens=int(lengths.output_tokens[index]), ignore_eos=True)


def at_poisson_times(asks: Sequence[Ask], seed: int, rate_per_s: float) -> list[Ask]:
    """Return the requests, arriving as a Poisson process."""
    arrivals_s = poisson_arrivals_s(seed, len(asks), rate_per_s)
    return [replace(ask, arrival_s=at_s) for ask, at_s in zip(asks, arrivals_s, strict=True)]


def poisson_arrivals_s(seed: int, number: int, rate_per_s: float) -> list[float]:
    """Arrival times of a Poisson process, in s.

    Drawn from a stream of their own: the same seed at another rate sends the same requests.
    """
    gaps = np.random.default_rng([seed, _ARRIVALS_STREAM]).exponential(1.0, size=number)
    return [round(float(arrival_s), 6) for arrival_s in np.cumsum(gaps) / rate_per_s]


def ordinary_tokens(vocabulary_tokens: int) -> int:
    """How many ids from 0 up are ordinary text tokens, by the rule above."""
    return vocabulary_tokens - max(8, round(vocabulary_tokens / 501))


def _fixed(count: int, prompt_tokens: int, output_tokens: int) -> Callable[[np.random.Generator], Lengths]:
    return lambda _rng: Lengths(np.full(count, prompt_tokens), np.full(count, output_tokens), np.full(count, -1))


def _mixed(rng: np.random.Generator) -> Lengths:
    """512 requests as chat traffic has them: lognormal, many short and a long tail (sigma 1.0 in, 0.8 out)."""
    prompt = np.clip(np.rint(rng.lognormal(np.log(512), 1.0, size=512)), 32, 4096).astype(np.int64)
    output = np.clip(np.rint(rng.lognormal(np.log(128), 0.8, size=512)), 8, 1024).astype(np.int64)
    return Lengths(prompt, output, np.full(512, -1))


def _shared_prefix(rng: np.random.Generator) -> Lengths:
    """256 requests over 8 system prompts, in random order, each with 64 to 256 tokens of its own."""
    prefix = rng.permutation(np.arange(256) % SHARED_PREFIXES)
    return Lengths(SHARED_PREFIX_TOKENS + rng.integers(64, 257, size=256), np.full(256, 128), prefix)


WORKLOADS: Mapping[str, Callable[[np.random.Generator], Lengths]] = {
    "single": _fixed(1, 512, 512),
    "batch32": _fixed(32, 512, 512),
    "batch256": _fixed(256, 512, 512),
    "prefill": _fixed(256, 2048, 1),
    "mixed": _mixed,
    "shared_prefix": _shared_prefix,
    # A full queue from the start, at the lengths for which engines' vendors publish their offline maximum.
    "throughput_128_128": _fixed(4096, 128, 128),
    "throughput_1000_1000": _fixed(1024, 1000, 1000),
    "throughput_2048_128": _fixed(512, 2048, 128),
}
"""A name's place among all names is part of its seed: a new one changes what those behind it draw."""
