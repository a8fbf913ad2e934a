"""A whole fleet with one of each service, asked over gRPC from this process."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import shoal
from benchmarks.engine.protocol import Answer, serve
from benchmarks.engine.shoal_settings import as_variables

END_LIMIT_S = 20.0


class ShoalFleet:
    """The fleet, up from `load` to `close`. Its processes are descendants of this one."""

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        """Start it, and wait until it is ready. Raises RuntimeError if it ends before."""
        self._state = tempfile.TemporaryDirectory()
        self._up = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli", "up", "--model", str(model)],
            env={**os.environ, **as_variables(settings), "SHOAL_STATE_DIR": self._state.name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._up.stdout
        line = self._up.stdout.readline()
        if not line:
            raise RuntimeError(f"`shoal up` ended with status {self._up.wait()}")
        processes = json.loads(line)["processes"]
        self._gateway = next(process["address"] for process in processes if process["kind"] == "gateway")
        return "one of each service, embedded Redis, gRPC"

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Ask all prompts at once, over a connection that is there already."""
        return asyncio.run(self._run(prompts, max_tokens))

    def close(self) -> None:
        """Stop the fleet, if it was started."""
        if not hasattr(self, "_up"):
            return
        self._up.terminate()
        self._up.wait(END_LIMIT_S)
        self._state.cleanup()

    async def _run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        first_s: list[float] = []

        async def ask(prompt: Sequence[int]) -> list[int]:
            token_ids: list[int] = []
            stream = client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0, seed=1, ignore_eos=True)
            async for delta in stream:
                if not token_ids:
                    first_s.append(time.perf_counter())
                token_ids.extend(delta.token_ids)
            return token_ids

        async with shoal.AsyncClient(self._gateway) as client:
            await client.list_models()
            began_s = time.perf_counter()
            token_ids = await asyncio.gather(*(ask(prompt) for prompt in prompts))
            last_s = time.perf_counter()
        return Answer(token_ids, min(first_s) - began_s, last_s - began_s)


if __name__ == "__main__":
    serve(ShoalFleet())
