"""A command at an address where nobody listens says so within seconds, with the address and what to do."""

import io
import socket
import sys
from pathlib import Path

import pytest

from shoal.cli.program import main


@pytest.fixture
def nobody() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.timeout(20)  # the client itself would wait for 30 s, and for 300 in a batch
@pytest.mark.parametrize(
    "command", [["generate", "hello"], ["generate", "--input", "cases"], ["chat"], ["trace", "id"]]
)
def test_nobody_at_the_address_is_told_soon(
    nobody: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cases").write_text('{"prompt": "hello"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main([*command, "--gateways", nobody]) == 1
    said = capsys.readouterr().err
    assert nobody in said
    assert "Is a gateway there? Start a fleet by `shoal up`, or name its gateways by --gateways" in said
