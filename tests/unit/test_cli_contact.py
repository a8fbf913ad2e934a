"""A command at an address where nobody listens says so within seconds, with the address and what to do."""

import asyncio
import io
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common.errors import Exhausted
from services.common.rpc import Server
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


class Busy(inference_pb2_grpc.InferenceServiceServicer):
    """A gateway that takes a request, and no other call."""

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:  # noqa: N802
        raise Exhausted("too many calls", reason="TOO_MANY_CALLS")

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id))
        yield pb.GenerateResponse(delta=pb.Delta(index=0, text="here", token_ids=[7]))
        yield pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))


async def test_a_gateway_that_refuses_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server([])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Busy(), server.grpc)  # type: ignore[abstract]
    address = await server.start("127.0.0.1:0")
    try:
        assert await asyncio.to_thread(main, ["generate", "--json", "hello", "--gateways", address]) == 0
    finally:
        await server.stop(0)
    assert '"text": "here"' in capsys.readouterr().out
