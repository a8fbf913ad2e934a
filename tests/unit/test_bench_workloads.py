"""Workloads and files of `shoal bench`: the same requests everywhere, and files that say what is wrong with them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from shoal.bench.ask import Ask, LoadError, read_asks
from shoal.bench.workloads import WORKLOADS, asks_of, ordinary_tokens, poisson_arrivals_s

# Number of requests, tokens of prompts, tokens of answers, and a digest of all, for seed 0 and a vocabulary of 49,152.
KNOWN = {
    "single": (1, 512, 512, "08bafb6d7048971c"),
    "batch32": (32, 16384, 16384, "e30c349454ded019"),
    "prefill": (256, 524288, 256, "3df47d18e24a09f8"),
    "mixed": (512, 412984, 90902, "fac522a3b91fedb0"),
    "shared_prefix": (256, 564232, 32768, "3953560b596c5efe"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_workload_is_the_same_everywhere(name: str) -> None:
    asks = list(asks_of(name, 0, 49_152))
    content = json.dumps([[ask.token_ids, ask.max_tokens] for ask in asks]).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    sums = (sum(len(ask.token_ids) for ask in asks), sum(ask.max_tokens for ask in asks))
    assert (len(asks), *sums, digest) == KNOWN[name]
    assert all(ask.ignore_eos for ask in asks)


def test_the_shapes_are_those_that_are_published() -> None:
    assert list(WORKLOADS) == [
        "single", "batch32", "batch256", "prefill", "mixed", "shared_prefix", "throughput_128_128",
        "throughput_1000_1000", "throughput_2048_128",
    ]  # fmt: skip


def test_ids_are_ordinary_tokens_only() -> None:
    assert ordinary_tokens(128_256) == 128_000
    ids = [token_id for ask in asks_of("batch32", 1, 1_000, first_token=17) for token_id in ask.token_ids]
    assert min(ids) == 17
    assert max(ids) == 991


def test_arrivals_are_poisson_and_the_same_at_each_rate() -> None:
    at_2 = poisson_arrivals_s(0, 20_000, 2.0)
    assert at_2[:3] == [0.016177, 0.331203, 2.187891]
    assert poisson_arrivals_s(0, 20_000, 4.0) == pytest.approx([at_s / 2 for at_s in at_2], abs=2e-6)
    gaps_s = np.diff(at_2)
    # Exponential gaps: mean and deviation are both 1 / rate.
    assert (np.mean(gaps_s), np.std(gaps_s)) == pytest.approx((0.5, 0.5), rel=0.03)


def test_a_file_has_a_request_a_line(tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text(
        '{"prompt": "The sea", "max_tokens": 3, "arrival_s": 0.5}\n\n'
        '{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1}\n'
        '{"prompt_token_ids": [4, 5], "ignore_eos": true}\n'
    )
    assert list(read_asks(path)) == [
        Ask(3, prompt="The sea", arrival_s=0.5),
        Ask(128, messages=({"role": "user", "content": "Hi"},), temperature=1.0),
        Ask(128, token_ids=(4, 5), ignore_eos=True),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: Expecting"),
        ("[]", "expected a JSON object, got list"),
        ('{"max_tokens": 3}', "0 of prompt, messages and token_ids are given"),
        ('{"prompt": "a", "token_ids": [1]}', "2 of prompt, messages and token_ids are given"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0; the least is 1"),
        ('{"prompt": "a", "arrival_s": -1}', "arrival_s is -1.0; the least is 0"),
        ('{"messages": [{"role": "user"}]}', "'content'"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text(line)
    with pytest.raises(LoadError, match=r"asks\.jsonl, line 1") as caught:
        list(read_asks(path))
    assert problem in str(caught.value)
