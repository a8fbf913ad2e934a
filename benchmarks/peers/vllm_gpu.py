"""vLLM's engine on a GPU, with files of requests; prints a JSON object a file. Of `benchmarks.beside_vllm`.

It runs in vLLM's environment, and so imports nothing of Shoal. Weights are dummies. Requests without `arrival_s` are
all there at the beginning; others are added at their times, by a thread of its own, since the engine's steps hold the
main one.
"""

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

Ask = dict[str, Any]
PERCENTILES = (50, 90, 99)


def main() -> None:
    """Run all loads in one process, the prefix cache emptied before each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), required=True)
    parser.add_argument("--warm-up", type=Path, nargs="+", required=True)
    parser.add_argument("--load", type=Path, nargs="+", required=True)
    given = parser.parse_args()
    began_s = time.monotonic()
    engine = LLM(
        model=given.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        quantization="fp8" if given.dtype == "fp8" else None,
        max_model_len=8192,
        gpu_memory_utilization=0.92,
    )
    print(json.dumps({"ready_s": round(time.monotonic() - began_s, 1)}), flush=True)
    for path in given.warm_up:
        all_at_once(engine, read(path))
    for path in given.load:
        asks = read(path)
        engine.reset_prefix_cache()
        figures = at_their_times(engine, path.stem, asks) if "arrival_s" in asks[0] else all_at_once(engine, asks)
        print(json.dumps({"workload": path.stem, **figures}), flush=True)


def read(path: Path) -> list[Ask]:
    """A load's requests."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_at_once(engine: LLM, asks: Sequence[Ask]) -> dict[str, float]:
    """Tokens a second, prompts' and generated."""
    prompts = [{"prompt_token_ids": ask["token_ids"]} for ask in asks]
    began_s = time.monotonic()
    answers = engine.generate(prompts, [sampling(ask) for ask in asks], use_tqdm=False)
    took_s = time.monotonic() - began_s
    generated = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return {
        "tokens_per_s": round(generated / took_s, 1),
        "prompt_tokens_per_s": round(sum(len(ask["token_ids"]) for ask in asks) / took_s, 1),
    }


def at_their_times(engine: LLM, name: str, asks: Sequence[Ask]) -> dict[str, list[float]]:
    """Percentiles of the time to the first token, from when it should arrive, and between tokens, ms."""
    tokens_s: list[list[float]] = [[] for _ in asks]
    begins_s = time.monotonic() + 0.2

    def add_all() -> None:
        num_added = 0
        try:
            for number, ask in enumerate(asks):
                time.sleep(max(0.0, begins_s + ask["arrival_s"] - time.monotonic()))
                prompt = {"prompt_token_ids": ask["token_ids"]}
                delta = sampling(ask, output_kind=RequestOutputKind.DELTA)
                engine.llm_engine.add_request(f"{name}/{number}", prompt, delta)
                num_added += 1
        finally:
            if num_added < len(asks):
                # The main thread would wait for ever.
                os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=add_all, daemon=True).start()
    num_done = 0
    while num_done < len(asks):
        for output in engine.llm_engine.step():
            if output.outputs and output.outputs[0].token_ids:
                # vLLM appends letters of its own to a request's name.
                number = int(output.request_id.removeprefix(f"{name}/").split("-")[0])
                tokens_s[number].append(time.monotonic())
            num_done += output.finished
    first = [moments[0] - begins_s - ask["arrival_s"] for moments, ask in zip(tokens_s, asks, strict=True)]
    between = [b - a for moments in tokens_s for a, b in pairwise(moments)]
    return {"ttft_ms": percentiles_ms(first), "itl_ms": percentiles_ms(between)}


def percentiles_ms(seconds: Sequence[float]) -> list[float]:
    """PERCENTILES, in ms."""
    return [round(1000 * float(value), 1) for value in np.percentile(seconds, PERCENTILES)]


def sampling(ask: Ask, **others: Any) -> SamplingParams:
    """Greedy, as many tokens as are asked for."""
    return SamplingParams(temperature=0, max_tokens=ask["max_tokens"], ignore_eos=True, detokenize=False, **others)


if __name__ == "__main__":
    main()
