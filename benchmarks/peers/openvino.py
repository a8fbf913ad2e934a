"""OpenVINO GenAI's continuous batching, on the GGUF file as it is stored: it reads no float32 one."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from benchmarks.engine.protocol import Answer, serve

CACHE_GB = 1
"""As a worker of Shoal has by default."""
STEP_TOKENS = 512
"""Most tokens computed at once."""


class OpenVino:
    def __init__(self) -> None:
        self._num_requests = 0

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = STEP_TOKENS
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU")
        return f"openvino-genai {openvino_genai.__version__}, weights as in the file"

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        config = openvino_genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        began_s = time.perf_counter()
        handles = [self._add(prompt, config) for prompt in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]
        first_s = 0.0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for tokens, handle in zip(token_ids, handles, strict=True):
                if handle.can_read():
                    (output,) = handle.read().values()
                    tokens.extend(output.generated_ids)
                    first_s = first_s or time.perf_counter()
        return Answer(token_ids, first_s - began_s, time.perf_counter() - began_s)

    def close(self) -> None:
        pass

    def _add(
        self, prompt: Sequence[int], config: "openvino_genai.GenerationConfig"
    ) -> "openvino_genai.GenerationHandle":
        self._num_requests += 1
        input_ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._num_requests, input_ids, config)


if __name__ == "__main__":
    serve(OpenVino())
