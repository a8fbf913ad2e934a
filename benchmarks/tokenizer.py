"""Tokens a second of the tokenizer service with many callers, against the library's own batch encode.

    python -m benchmarks.tokenizer [--callers 32] [--seconds 3]

Starts a service, asks it over gRPC from this process, then encodes the same prompts with `encode_batch` here, which
uses every core. Prints one JSON line for each size of prompt. The smaller the prompt, the smaller the ratio: a call
costs about the same whatever it carries, see `front_us_per_call`.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from gen.shoal.fleet.v1 import tokenizer_pb2_grpc
from gen.shoal.fleet.v1.tokenizer_pb2 import EncodeRequest
from services.common import rpc
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.tokenizer.encoding import build_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and it is 2024 already. "
PROMPT_BYTES = (256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Served:
    """What the service did: its speed, and the CPU time of its front."""

    tokens_per_s: float
    calls_per_s: float
    front_us_per_call: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "services.tokenizer", "--log-level", "ERROR"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        ready = json.loads(service.stdout.readline())
        print(json.dumps({"start_up_s": round(time.perf_counter() - started_s, 2)}))
        for num_bytes in PROMPT_BYTES:
            prompts = [f"{number} {SENTENCE * (num_bytes // len(SENTENCE) + 1)}"[:num_bytes] for number in range(100)]
            served = asyncio.run(serve(ready, prompts, options.callers, options.seconds))
            library = batch_encode(prompts, options.seconds)
            line = {
                "prompt_bytes": num_bytes,
                "service_tokens_per_s": round(served.tokens_per_s),
                "service_calls_per_s": round(served.calls_per_s),
                "library_tokens_per_s": round(library),
                "ratio": round(served.tokens_per_s / library, 2),
                "front_us_per_call": round(served.front_us_per_call),
            }
            print(json.dumps(line), flush=True)
        front = psutil.Process(service.pid)
        sizes = {
            "front_mib": front.memory_info().rss >> 20,
            "pool_mib": [c.memory_info().rss >> 20 for c in front.children()],
        }
        print(json.dumps(sizes))
        service.terminate()


async def serve(ready: dict[str, str], prompts: Sequence[str], num_callers: int, seconds: float) -> Served:
    num_tokens = num_calls = 0
    requests = [EncodeRequest(prompt=prompt) for prompt in prompts]
    async with rpc.channel(ready["address"]) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        front = psutil.Process(int(ready["pid"]))

        async def call_until(end_s: float) -> None:
            nonlocal num_tokens, num_calls
            while time.perf_counter() < end_s:
                response = await stub.Encode(requests[num_calls % len(requests)])
                num_calls += 1
                num_tokens += len(response.token_ids)

        await stub.Encode(requests[0])
        cpu_before, started_s = front.cpu_times(), time.perf_counter()
        await asyncio.gather(*(call_until(started_s + seconds) for _ in range(num_callers)))
        elapsed_s, cpu_after = time.perf_counter() - started_s, front.cpu_times()
    cpu_s = cpu_after.user + cpu_after.system - cpu_before.user - cpu_before.system
    return Served(num_tokens / elapsed_s, num_calls / elapsed_s, cpu_s / num_calls * 1e6)


def batch_encode(prompts: Sequence[str], seconds: float) -> float:
    """Tokens a second of the library, over batches of these prompts."""
    tokenizer = build_tokenizer(read_gguf(default_model_path()))
    num_tokens = 0
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        num_tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(prompts)))
    return num_tokens / (time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
