"""The memory's bandwidth: `python -m benchmarks.engine.memory` says `ready`, then GB/s.

Reads 540 MB of float32, about what a step of the default model reads, with all cores; the median of 20 reads,
which is what a step can count on: on a virtual machine single reads come to twice that.
"""

import os
import statistics
import time

import torch

BUFFER_BYTES = 540_000_000
READS = 20


def main() -> None:
    """Print the figure."""
    torch.set_num_threads(os.cpu_count() or 1)
    buffer = torch.ones(BUFFER_BYTES // 4)
    print("ready", flush=True)
    read_s = statistics.median(_read_s(buffer) for _ in range(READS))
    print(BUFFER_BYTES / read_s / 1e9, flush=True)
    # Alive until its processor time was read.
    time.sleep(0.2)


def _read_s(buffer: torch.Tensor) -> float:
    began_s = time.perf_counter()
    buffer.sum()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
