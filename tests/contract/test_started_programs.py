"""What starts programs beside gRPC of its own: nothing is said of forks in their logs."""

import os
import subprocess
import sys

import pytest

SERVES_AND_STARTS = """
import {package}
import asyncio
from services.common.rpc import Server

async def main():
    server = Server([])
    await server.start("127.0.0.1:0")
    for _ in range(3):
        await (await asyncio.create_subprocess_exec("true", preexec_fn=int)).wait()
    await server.stop(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("package", ["services.worker", "services.tokenizer", "shoal.cli"])
def test_nothing_is_said_of_forks(package: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", SERVES_AND_STARTS.format(package=package)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
