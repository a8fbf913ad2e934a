"""What a worker can be told."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from services.common.config import ConfigError, option
from services.common.service_options import ServiceOptions
from services.worker.weight_format import Device, DeviceWeightFormat, KvFormat, WeightFormat


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a device is used for, where a flag says 0."""

    kv_cache_bytes: int
    block_size_tokens: int
    max_sequences: int
    max_prefill_tokens_per_step: int
    step_budget_ms: int
    """0: none, of batch work."""
    context_tokens: int
    """0: the model's."""


SIZES: Mapping[Device, Sizes] = {
    "cpu": Sizes(1 << 30, 16, 32, 256, 200, 0),
    # The cache: 0, what the GPU's memory has left. A step is told the block tables of all its sequences, as long as the
    # longest may be: so the context is not what a model could have, unless asked for.
    "cuda": Sizes(0, 64, 256, 2048, 11, 8192),
}
BATCH_SIZES: Mapping[Device, Sizes] = {
    "cpu": replace(SIZES["cpu"], step_budget_ms=0),
    "cuda": replace(SIZES["cuda"], max_sequences=512, max_prefill_tokens_per_step=8192, step_budget_ms=0),
}
"""Of a worker for batch work."""


@dataclass(frozen=True, slots=True)
class WorkerConfig(ServiceOptions):
    """One worker: its front, and the engine that the front starts."""

    redis_url: str = option("redis://127.0.0.1:6379", "where Redis is")
    pool: str = option("smollm2-135m-instruct", "name of the pool, which is the model's name")
    model_path: Path = option(..., "the model's GGUF file or folder")
    device: Device = option("cpu", "what computes: cpu, or cuda for a GPU")
    weights: WeightFormat = option("float32", "how a CPU's engine holds weights: float32, or int8 for speed")
    dtype: DeviceWeightFormat = option("bf16", "how a GPU holds weights: bf16, fp8 for speed, or float32")
    kv_dtype: KvFormat = option("auto", "how a GPU holds keys and values: fp8, or auto: as what is computed")
    dummy: bool = option(False, "random weights of the folder's shape on a GPU: to measure with")
    shards: int = option(
        1,
        "processes that the model is dealt out to, each with its part and a GPU, if it is on GPUs",
        minimum=1,
        maximum=64,
    )
    listen: str = option("127.0.0.1:0", "address of the front's gRPC server; port 0: any")
    kv_cache_bytes: int = option(0, "memory of the KV cache; 0: 1 GiB, or what a GPU has left", minimum=0)
    block_size_tokens: int = option(0, "token slots a block; 0: 16, on a GPU 64", minimum=0, maximum=256)
    max_sequences: int = option(
        0, "most sequences in a step; 0: 32, on a GPU 256, for batch work 512", minimum=0, maximum=4096
    )
    max_prefill_tokens_per_step: int = option(
        0, "most prompt tokens a step; 0: 256, on a GPU 2048, for batch work 8192", minimum=0, maximum=65536
    )
    step_budget_ms: int = option(
        0,
        "longest that a step shall take while sequences decode: the time between two tokens; 0: 200, on a GPU 11, for "
        "batch work any",
        minimum=0,
    )
    batch: bool = option(
        False,
        "for batch work, of which only the end counts: who may write most first, prompts fill up steps",
    )
    context_tokens: int = option(
        0, "most tokens of prompt and answer together; 0: the model's, on a GPU at most 8192", minimum=0
    )
    threads: int = option(0, "threads of the engine; 0: one a core", minimum=0, maximum=1024)
    journal_interval_ms: int = option(100, "longest time between two writes of a request's journal", minimum=1)
    journal_tokens: int = option(16, "tokens of one request that are journaled without waiting", minimum=1)
    report_interval_ms: int = option(200, "longest time between two reports to the leader", minimum=10, maximum=1000)
    registration_ttl_ms: int = option(5000, "the worker is forgotten after this time without a report", minimum=1000)
    resume_grace_ms: int = option(
        2000, "how long a continued request waits for its reader before it samples", minimum=0, maximum=8000
    )
    retention_ms: int = option(600_000, "how long an ended request is kept", minimum=1000)
    log_prompts: bool = option(False, "write texts of unforeseen errors into the log; they may quote a prompt")

    def check(self) -> None:
        """See to it that flags fit each other. Raises ConfigError for two that do not, or one of the other device."""
        if self.batch and self.step_budget_ms:
            raise ConfigError(
                f"--step-budget-ms is {self.step_budget_ms}, and batch work has none: leave out one of both"
            )
        if self.device == "cuda":
            if self.weights != "float32":
                raise ConfigError(f"--weights is {self.weights}, which is of the CPU; on a GPU --dtype says how")
        elif self.dtype == "fp8" or self.kv_dtype == "fp8" or self.dummy:
            flag = "--dtype" if self.dtype == "fp8" else "--kv-dtype" if self.kv_dtype == "fp8" else "--dummy"
            raise ConfigError(f"{flag} is of a GPU: give --device cuda, or leave it out")
