"""From `shoal up` to the first token, and what each process takes: `python -m benchmarks.start --runs 5`.

One of each service, embedded Redis, the default model on disk. A run starts the fleet, asks one question, and reads the
resident memory of every process of the fleet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

from shoal import Client

BOUNDED_KINDS = ("gateway", "tokenizer", "scheduler", "worker")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = [measure() for _ in range(parser.parse_args().runs)]
    seconds = [first_token_s for first_token_s, _ in runs]
    print(f"shoal up to first token: median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s")
    for kind in (*BOUNDED_KINDS, "engine"):
        print(f"{kind}: {max(memory[kind] for _, memory in runs) / 1e6:.0f} MB resident")


def measure() -> tuple[float, dict[str, int]]:
    """One run: seconds to the first token, and resident bytes by kind."""
    with tempfile.TemporaryDirectory() as state_dir:
        environment = {**os.environ, "SHOAL_STATE_DIR": state_dir}
        shoal = [sys.executable, "-m", "shoal.cli"]
        began = time.perf_counter()
        line = subprocess.run([*shoal, "up", "--detach"], env=environment, capture_output=True, check=True).stdout
        try:
            processes = json.loads(line)["processes"]
            gateway = next(process["address"] for process in processes if process["kind"] == "gateway")
            with Client(gateway) as client:
                next(iter(client.generate("The sea is", temperature=0, max_tokens=1)))
                first_token_s = time.perf_counter() - began
            memory = {process["kind"]: psutil.Process(process["pid"]).memory_info().rss for process in processes}
        finally:
            subprocess.run([*shoal, "down"], env=environment, check=True, capture_output=True)
    return first_token_s, memory


if __name__ == "__main__":
    main()
