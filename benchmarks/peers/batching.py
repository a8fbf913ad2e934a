"""transformers' continuous batching, through a manager that is kept from run to run."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.engine.protocol import Answer, serve
from benchmarks.peers.gguf_model import load_model

# What it makes of a CPU's memory by itself is far more than these workloads need: 32 streams of 192 tokens. Pages have
# the default size, 256 tokens; 32 were not faster.
NUM_PAGES = 64
MAX_BATCH_TOKENS = 1024
RESULT_LIMIT_S = 300.0


class ContinuousBatching:
    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        self._manager = load_model(model).init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=NUM_PAGES,
                max_batch_tokens=MAX_BATCH_TOKENS,
                allow_block_sharing=False,
            ),
        )
        self._manager.start()
        return f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Raises RuntimeError if a request fails or nothing comes."""
        began_s = time.perf_counter()
        request_ids = [
            # Streamed, as the first token's time is wanted.
            self._manager.add_request(list(prompt), max_new_tokens=max_tokens, streaming=True, eos_token_id=-1)
            for prompt in prompts
        ]
        token_ids: dict[str, list[int]] = {}
        first_s = 0.0
        while len(token_ids) < len(prompts):
            result = self._manager.get_result(timeout=RESULT_LIMIT_S)
            if result is None or result.error:
                raise RuntimeError(f"no result: {result.error if result else 'none came, or its thread ended'}")
            first_s = first_s or time.perf_counter()
            if result.is_finished():
                token_ids[result.request_id] = list(result.generated_tokens)
        last_s = time.perf_counter()
        return Answer([token_ids[str(name)] for name in request_ids], first_s - began_s, last_s - began_s)

    def close(self) -> None:
        if hasattr(self, "_manager"):
            self._manager.stop(hard_stop=True)


if __name__ == "__main__":
    serve(ContinuousBatching())
