"""Options of the tokenizer service."""

import os
from dataclasses import dataclass

from services.common.config import option
from services.common.service_options import ServiceOptions


@dataclass(frozen=True, slots=True)
class TokenizerConfig(ServiceOptions):
    """Renders chats and turns text into tokens, for one model, in a pool of processes."""

    listen: str = option("127.0.0.1:0", "host:port to serve gRPC on; port 0: any free one")
    pool: str = option("smollm2-135m-instruct", "name of the pool, which is the model's name")
    model_path: str = option(
        "", "the model's GGUF file or folder; empty: the default model, from its installed package"
    )
    processes: int = option(0, "pool processes; 0: one a core, at least 2", minimum=0, maximum=1024)
    max_input_bytes: int = option(4 << 20, "most bytes of one serialized input", minimum=1, maximum=15 << 20)
    max_queued_inputs: int = option(1024, "most inputs waiting for a process; more are refused", minimum=1)
    max_queued_bytes: int = option(64 << 20, "most bytes of inputs waiting for a process", minimum=1)
    input_limit_ms: int = option(30_000, "longest time that a process may work at one input", minimum=1)
    format_limit_ms: int = option(
        3_000,
        "longest time that a process may compile one response_format; one that takes longer is refused",
        minimum=1,
    )
    stop_grace_ms: int = option(5_000, "how long open calls may go on after SIGTERM", minimum=0)
    log_prompts: bool = option(False, "write texts of unforeseen errors into the log; they may quote a prompt")

    @property
    def num_processes(self) -> int:
        """Size of the pool. With 2, short inputs never wait for a long one."""
        return self.processes or max(2, os.cpu_count() or 1)
