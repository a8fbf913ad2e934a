"""Tokens a second of the tokenizer service with many callers, against the library's own batch encodes.

    python -m benchmarks.tokenizer [--callers 32] [--seconds 3]

Starts a service, asks it over gRPC from this process, and encodes the same prompts here with `encode_batch` and
`encode_batch_fast` (which leaves out where tokens are in the text, as the service does); both use every core. They take
turns, but only a machine that does nothing else gives true ratios: under load, the service's more processes get more of
it. The smaller the prompt, the smaller the ratio: a call costs about the same whatever it carries, see
`front_us_per_call`. Prints one JSON line for each size of prompt.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
from tokenizers import Encoding

from gen.shoal.fleet.v1 import tokenizer_pb2_grpc
from gen.shoal.fleet.v1.tokenizer_pb2 import EncodeRequest
from services.common import rpc
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.tokenizer.gguf_tokenizer import build_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and it is 2024 already. "
PROMPT_BYTES = (256, 1024, 4096, 16384, 65536)
ROUNDS = 6


@dataclass(frozen=True)
class Served:
    """What the service did: its speed, and the CPU time of its front."""

    tokens_per_s: float
    calls_per_s: float
    front_us_per_call: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each of the three, at each size of prompt")
    options = parser.parse_args()
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "services.tokenizer", "--log-level", "ERROR"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        ready = json.loads(service.stdout.readline())
        print(json.dumps({"start_up_s": round(time.perf_counter() - started_s, 2)}))
        for num_bytes in PROMPT_BYTES:
            print(json.dumps(compare(ready, num_bytes, options.callers, options.seconds / ROUNDS)), flush=True)
        front = psutil.Process(service.pid)
        pool_mib = [child.memory_info().rss >> 20 for child in front.children()]
        print(json.dumps({"front_mib": front.memory_info().rss >> 20, "pool_mib": pool_mib}))
        service.terminate()


def compare(ready: dict[str, str], num_bytes: int, num_callers: int, round_s: float) -> dict[str, float]:
    """Medians over the rounds, for prompts of one size."""
    tokenizer = build_tokenizer(read_gguf(default_model_path()))
    prompts = [f"{number} {SENTENCE * (num_bytes // len(SENTENCE) + 1)}"[:num_bytes] for number in range(32)]
    served, batch, fast = [], [], []
    for _ in range(ROUNDS):
        served.append(asyncio.run(serve(ready, prompts, num_callers, round_s)))
        batch.append(batch_encode(tokenizer.encode_batch, prompts, round_s))
        fast.append(batch_encode(tokenizer.encode_batch_fast, prompts, round_s))
    tokens_per_s = statistics.median(one.tokens_per_s for one in served)
    return {
        "prompt_bytes": num_bytes,
        "service_tokens_per_s": round(tokens_per_s),
        "service_calls_per_s": round(statistics.median(one.calls_per_s for one in served)),
        "encode_batch_tokens_per_s": round(statistics.median(batch)),
        "encode_batch_fast_tokens_per_s": round(statistics.median(fast)),
        "ratio": round(tokens_per_s / statistics.median(batch), 2),
        "ratio_to_fast": round(tokens_per_s / statistics.median(fast), 2),
        "front_us_per_call": round(statistics.median(one.front_us_per_call for one in served)),
    }


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


def batch_encode(encode: Callable[[list[str]], list[Encoding]], prompts: list[str], seconds: float) -> float:
    """Tokens a second of the library, over batches of these prompts."""
    num_tokens = 0
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        num_tokens += sum(len(encoding.ids) for encoding in encode(prompts))
    return num_tokens / (time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
