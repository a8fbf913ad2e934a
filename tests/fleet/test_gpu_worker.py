"""`shoal up --device cuda`: workers compute on GPUs, in CI in Triton's interpreter; clients see no difference."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from tests.fleet.conftest import Fleet, run_shoal
from tests.unit.tiny_models import save, tiny_model

END = 299
SMALLEST = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
SMALLEST |= {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Of a model that the interpreter computes in a fraction of a second a step."""
PROMPT = [5, 6, 7, 8]
SIZES = {"KV_CACHE_BYTES": 1 << 20, "BLOCK_SIZE_TOKENS": 16, "MAX_SEQUENCES": 4, "MAX_PREFILL_TOKENS_PER_STEP": 64}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=300, eos_token_id=END, **SMALLEST)


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "two-shards"])
def fleet(
    model: Any, start: Callable[..., Fleet], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Fleet]:
    """Of a folder without a tokenizer: `--dummy` makes one up. Its weights are there all the same, and are not read."""
    if torch.cuda.is_available() and torch.cuda.device_count() < request.param:
        pytest.skip("takes a GPU for each shard")
    folder = save(model, tmp_path_factory.mktemp("models") / "tiny")
    with pytest.MonkeyPatch.context() as environment:
        if not torch.cuda.is_available():
            environment.setenv("TRITON_INTERPRET", "1")
        for name, value in SIZES.items():
            environment.setenv(f"SHOAL_{name}", str(value))
        shards = ("--shards", str(request.param))
        yield start("--model", str(folder), "--device", "cuda", "--dtype", "float32", "--dummy", *shards)


def ask(client: shoal.Client, max_tokens: int) -> shoal.Stream:
    return client.generate(token_ids=PROMPT, max_tokens=max_tokens, temperature=0, ignore_eos=True)


def test_a_client_is_answered(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = ask(client, 3)
        stream.read()
    assert len(stream.token_ids) == 3
    assert stream.text, "each token of a made-up tokenizer has a text"


@pytest.mark.parametrize("fleet", [2], indirect=True, ids=["two-shards"])
def test_a_process_that_is_killed_costs_no_token(fleet: Fleet) -> None:
    with fleet.client() as client:
        undisturbed = ask(client, 6)
        undisturbed.read()
        disturbed = ask(client, 6)
        next(iter(disturbed))
        os.kill(fleet.of_kind("engine")[-1].pid, signal.SIGKILL)
        disturbed.read()
    assert len(disturbed.token_ids) == 6
    assert disturbed.token_ids == undisturbed.token_ids


@pytest.mark.parametrize("flags", [["--dtype", "fp8"], ["--kv-dtype", "fp8"], ["--dummy"]])
def test_what_is_of_a_gpu_is_refused_without_one(tmp_path: Path, flags: list[str]) -> None:
    refused = run_shoal(tmp_path, "up", *flags)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{flags[0]} is of a GPU: give --device cuda with it" in refused.stderr
