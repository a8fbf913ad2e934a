"""The engine as a process: it loads, computes, and ends in the ways it promises."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.common.ending import UNFIT_STATUS
from services.common.model.location import default_model_path
from services.worker.engine_config import EngineConfig
from services.worker.front.engine_client import ENGINE_ENVIRONMENT
from tests.unit.engine_builders import add, add_command, shutdown_command

CASES = [json.loads(line) for line in Path("tests/reference/smollm2_greedy.jsonl").read_text().splitlines()]
LONGEST_WAIT_S = 60


class Front:
    """The front's end of an engine process."""

    def __init__(self, model_path: Path) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(LONGEST_WAIT_S)
        with theirs:
            config = EngineConfig(
                fd=theirs.fileno(),
                model_path=model_path,
                kv_cache_bytes=1 << 28,
                block_size_tokens=16,
                max_sequences=8,
                max_prefill_tokens_per_step=64,
                step_budget_ms=200,
                threads=2,
                weights="float32",
            )
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.worker.engine_process", *config.arguments()],
                pass_fds=[theirs.fileno()],
                # As the front does: without it, torch's threads spin at barriers while other tests want the cores.
                env={**ENGINE_ENVIRONMENT, **os.environ},
                stderr=subprocess.PIPE,
                text=True,
            )

    def send(self, command: engine_pb2.EngineCommand) -> None:
        data = command.SerializeToString()
        self.connection.sendall(struct.pack("<I", len(data)) + data)

    def receive(self, kind: str) -> engine_pb2.EngineEvent:
        """The next event of a kind; others before it are dropped."""
        while True:
            event = engine_pb2.EngineEvent.FromString(self._exactly(*struct.unpack("<I", self._exactly(4))))
            if event.WhichOneof("event") == kind:
                return event

    def status(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=LONGEST_WAIT_S)
        return self.process.returncode, errors

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.communicate()

    def _exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            piece = self.connection.recv(num_bytes - len(data))
            assert piece, "the engine is gone"
            data += piece
        return data


@pytest.fixture
def start() -> Iterator[Callable[[Path], Front]]:
    fronts: list[Front] = []

    def start_front(model_path: Path) -> Front:
        fronts.append(Front(model_path))
        return fronts[-1]

    yield start_front
    for front in fronts:
        front.close()


def test_an_engine_answers_waits_without_work_and_shuts_down(start: Callable[[Path], Front]) -> None:
    front = start(default_model_path())
    assert front.receive("loading").loading.stage == "starting torch"
    ready = front.receive("ready").ready
    assert (ready.num_blocks, ready.block_size_tokens, ready.context_tokens) == (364, 16, 8192)
    assert (ready.max_sequences, ready.max_prefill_tokens_per_step, ready.pid) == (8, 64, front.process.pid)

    case = next(case for case in CASES if case["name"] == "chat_capital")
    sequence = add(7, prompt=case["prompt_token_ids"], max_tokens=case["max_tokens"])
    sequence.payload.stop_token_ids[:] = [2]
    front.send(add_command(sequence))
    tokens: list[int] = []
    end = engine_pb2.SEQUENCE_END_UNSPECIFIED
    while not end:
        (output,) = front.receive("done").done.outputs
        tokens += output.token_ids
        end = output.end
    assert tokens == case["output_token_ids"]
    assert end == engine_pb2.SEQUENCE_END_STOP_TOKEN

    before = _cpu_seconds(front.process.pid)
    time.sleep(0.5)
    assert _cpu_seconds(front.process.pid) - before < 0.1

    front.process.send_signal(signal.SIGINT)
    front.send(shutdown_command())
    front.connection.close()
    assert front.status() == (0, "")


def test_an_engine_ends_within_a_step_when_its_front_dies(start: Callable[[Path], Front]) -> None:
    front = start(default_model_path())
    front.receive("ready")
    front.send(add_command(add(1, prompt=64, max_tokens=2000)))
    front.receive("done")
    front.connection.close()
    began = time.monotonic()
    assert front.status() == (1, "engine: the front is gone\n")
    assert time.monotonic() - began < 5


def test_an_engine_says_what_is_wrong_with_its_model(start: Callable[[Path], Front], tmp_path: Path) -> None:
    front = start(tmp_path / "absent.gguf")
    assert front.receive("unfit").unfit.reason.startswith(f"{tmp_path}/absent.gguf: ")
    assert front.status() == (UNFIT_STATUS, "")


def test_flags_are_read_back_as_they_were_given() -> None:
    config = EngineConfig(3, Path("a model.gguf"), 1 << 30, 16, 8, 512, 200, 2, "float32")
    assert EngineConfig.parse(config.arguments()) == config


def test_a_flag_out_of_range_ends_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = EngineConfig(3, Path("model.gguf"), 1 << 30, 16, 0, 512, 200, 2, "float32").arguments()
    with pytest.raises(SystemExit) as exit_info:
        EngineConfig.parse(arguments)
    assert exit_info.value.code == 2
    assert "argument --max-sequences: 0 is below 1" in capsys.readouterr().err


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100
