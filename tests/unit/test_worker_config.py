"""What a worker makes of its flags before it starts an engine."""

from pathlib import Path
from typing import Any

import pytest

from services.common.config import ConfigError
from services.worker.config import WorkerConfig
from services.worker.engine_config import EngineConfig
from services.worker.front.engine_client import engine_config


def a_config(**flags: Any) -> WorkerConfig:
    return WorkerConfig(model_path=Path("model"), **flags)


def test_sizes_that_are_not_given_are_those_of_the_device() -> None:
    on_cpu, on_gpu = (engine_config(a_config(device=device), 3) for device in ("cpu", "cuda"))
    assert (on_cpu.block_size_tokens, on_cpu.max_sequences, on_cpu.kv_cache_bytes) == (16, 32, 1 << 30)
    assert (on_gpu.block_size_tokens, on_gpu.max_sequences, on_gpu.kv_cache_bytes) == (64, 256, 0)
    assert engine_config(a_config(device="cuda", max_sequences=7), 3).max_sequences == 7


def test_an_engine_reads_back_what_its_front_tells_it() -> None:
    told = engine_config(a_config(device="cuda", dtype="fp8", kv_dtype="fp8", dummy=True), 3)
    assert EngineConfig.parse(told.arguments()) == told
    assert (told.device, told.dtype, told.kv_dtype, told.dummy) == ("cuda", "fp8", "fp8", True)


def test_a_worker_for_batch_work_has_no_step_budget_and_on_a_gpu_larger_steps() -> None:
    on_cpu, on_gpu = (engine_config(a_config(device=device, batch=True), 3) for device in ("cpu", "cuda"))
    assert (on_cpu.step_budget_ms, on_cpu.max_sequences, on_cpu.max_prefill_tokens_per_step) == (0, 32, 256)
    assert (on_gpu.step_budget_ms, on_gpu.max_sequences, on_gpu.max_prefill_tokens_per_step) == (0, 512, 8192)
    assert EngineConfig.parse(on_gpu.arguments()) == on_gpu
    assert on_gpu.budget_ms is None
    assert engine_config(a_config(), 3).budget_ms == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"device": "cuda", "weights": "int8"}, "--weights is int8"),
        ({"dtype": "fp8"}, "--dtype is of a GPU"),
        ({"kv_dtype": "fp8"}, "--kv-dtype is of a GPU"),
        ({"dummy": True}, "--dummy is of a GPU"),
        ({"batch": True, "step_budget_ms": 50}, "--step-budget-ms is 50, and batch work has none"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        a_config(**flags).check()
