"""Compiles the kernels: `python -m services.worker.cpu_kernels.build`, a part of `make setup`.

One library for each instruction set, so that what is built on one machine runs on every other of its architecture. The
compiler is clang out of a Python package: nothing is asked of the system.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARIES = SOURCES / "lib"
TARGETS = {
    "x86_64": {
        "amx": "x86_64_v4+avx512vnni+amx_tile+amx_int8",
        "avx512": "x86_64_v4+avx512vnni",
        "avx2": "x86_64_v3",
        "generic": "x86_64_v2",
    },
    "aarch64": {"generic": "generic"},
}
"""For each architecture, its instruction sets and their names in the compiler's words."""
_FLAGS = (
    *("-std=c11", "-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"),
    # No C library; OpenMP's functions are found in the process, where torch brings them.
    *("-shared", "-fPIC", "-ffreestanding", "-nostdlib", "-Wl,-z,undefs", "-s"),
)


def main() -> None:
    """Compile for every instruction set of this machine's architecture."""
    architecture = platform.machine()
    if architecture not in TARGETS:
        sys.exit(f"the CPU kernels are built for {', '.join(TARGETS)}; this machine is {architecture}")
    LIBRARIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        for name, cpu in TARGETS[architecture].items():
            compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-gnu", f"-mcpu={cpu}"]
            sources = sorted(str(source) for source in SOURCES.glob("*.c"))
            # A process that runs the old library keeps it: the new one takes its name, not its place.
            unfinished = LIBRARIES / f"{name}.so.new"
            subprocess.run([*compiler, *_FLAGS, *sources, "-o", str(unfinished)], check=True, env=environment)
            unfinished.rename(LIBRARIES / f"{name}.so")


if __name__ == "__main__":
    main()
