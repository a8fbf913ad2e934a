"""What a worker can be told."""

from dataclasses import dataclass
from pathlib import Path

from services.common.config import option
from services.common.service_options import ServiceOptions
from services.worker.weight_format import WeightFormat


@dataclass(frozen=True, slots=True)
class WorkerConfig(ServiceOptions):
    """One worker: its front, and the engine that the front starts."""

    redis_url: str = option("redis://127.0.0.1:6379", "where Redis is")
    pool: str = option("smollm2-135m-instruct", "name of the pool, which is the model's name")
    model_path: Path = option(..., "the model's GGUF file or folder")
    weights: WeightFormat = option("float32", "how the engine holds weights: float32, or int8 for speed")
    shards: int = option(1, "processes that the model is dealt out to, each with its part", minimum=1, maximum=64)
    listen: str = option("127.0.0.1:0", "address of the front's gRPC server; port 0: any")
    kv_cache_bytes: int = option(1 << 30, "memory of the KV cache", minimum=1 << 20)
    block_size_tokens: int = option(16, "token slots a block", minimum=1, maximum=256)
    max_sequences: int = option(32, "most sequences in a step", minimum=1, maximum=4096)
    max_prefill_tokens_per_step: int = option(256, "most prompt tokens a step", minimum=1, maximum=65536)
    step_budget_ms: int = option(
        200, "longest that a step shall take while sequences decode: bounds the time between two tokens", minimum=1
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
