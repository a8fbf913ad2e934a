"""`shoal bench serve` against servers whose tokens come at known times, over gRPC and over OpenAI's HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from shoal.bench.answer import Answer
from shoal.bench.ask import Ask
from shoal.bench.load import closed_loop, open_loop
from shoal.bench.openai_target import OpenAITarget
from shoal.bench.shoal_target import ShoalTarget
from shoal.bench.target import OnTokens, Target, TargetError, TokenCounts
from shoal.cli import main
from shoal.fleet.certificates import make_certificates
from tests.contract.paced_servers import FIRST_S, PAUSE_S, PacedServer, SteppedClock, paced_gateway, paced_http

AN_ASK = Ask(max_tokens=10, token_ids=(1, 2, 3), ignore_eos=True)


@asynccontextmanager
async def a_grpc_target(paced: PacedServer) -> AsyncIterator[Target]:
    async with paced_gateway(paced) as address:
        target = ShoalTarget([address], "", 10.0)
        try:
            yield target
        finally:
            await target.close()


@asynccontextmanager
async def an_http_target(paced: PacedServer) -> AsyncIterator[Target]:
    async with paced_http(paced) as url:
        target = OpenAITarget(url, "", 10.0)
        try:
            await target.find_model()
            yield target
        finally:
            await target.close()


def a_target(protocol: str, paced: PacedServer) -> AbstractAsyncContextManager[Target]:
    return a_grpc_target(paced) if protocol == "grpc" else an_http_target(paced)


both = pytest.mark.parametrize("protocol", ["grpc", "http"])


@both
async def test_each_token_is_timed_when_it_comes(protocol: str) -> None:
    paced = PacedServer()
    async with a_target(protocol, paced) as target:
        (answer,) = await open_loop(target, [AN_ASK], paced.clock)
    assert answer.error == ""
    assert answer.counts == TokenCounts(10, 10, 4)
    assert answer.time_to_first_token_s == pytest.approx(FIRST_S)
    assert answer.inter_token_s == pytest.approx([PAUSE_S] * 9)
    assert answer.time_per_output_token_s == pytest.approx(PAUSE_S)
    assert answer.end_to_end_s == pytest.approx(FIRST_S + 9 * PAUSE_S)


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
async def test_a_server_need_not_tell_what_it_had_cached(details: dict[str, object]) -> None:
    paced = PacedServer(details=details)
    async with an_http_target(paced) as target:
        (answer,) = await open_loop(target, [AN_ASK], paced.clock)
    assert answer.counts == TokenCounts(10, 10, None)


@both
async def test_waiting_for_a_busy_server_is_part_of_the_latency(protocol: str) -> None:
    paced = PacedServer()
    async with a_target(protocol, paced) as target:
        answers = await open_loop(target, [AN_ASK] * 3, paced.clock)
    each_s = FIRST_S + 9 * PAUSE_S
    waited_s = sorted(answer.time_to_first_token_s for answer in answers)
    # The end of another answer may be taken for a reading of the clock, once an answer.
    assert waited_s == pytest.approx([FIRST_S, FIRST_S + each_s, FIRST_S + 2 * each_s], abs=3 * PAUSE_S)


@both
async def test_failures_have_kinds_and_the_servers_words(protocol: str) -> None:
    paced = PacedServer(failures=["full", "broken", "short"])
    async with a_target(protocol, paced) as target:
        answers = await closed_loop(target, [AN_ASK] * 4, 1, paced.clock)
    full = {"grpc": "RESOURCE_EXHAUSTED BACKLOG_FULL", "http": "HTTP 429"}[protocol]
    assert [answer.error for answer in answers] == [full, "broken stream", "wrong length", ""]
    assert "the queue is full" in answers[0].error_text
    assert "9 tokens instead of 10" in answers[2].error_text


async def test_a_server_that_is_not_there_is_a_failure_too() -> None:
    for target in (ShoalTarget(["127.0.0.1:1"], "", 10.0), OpenAITarget("http://127.0.0.1:1", "a-model", 10.0)):
        (answer,) = await open_loop(target, [AN_ASK], SteppedClock())
        await target.close()
        assert answer.error in ("UNAVAILABLE", "ClientConnectorError")


async def test_a_server_that_names_no_model_wants_one_given() -> None:
    async with paced_http(PacedServer()) as url:
        target = OpenAITarget(f"{url}/elsewhere", "", 10.0)
        with pytest.raises(TargetError, match=r"names no model .* give one"):
            await target.find_model()
        await target.close()


async def test_a_chat_is_asked_as_a_chat() -> None:
    ask = Ask(max_tokens=2, messages=({"role": "user", "content": "Hi"},))
    paced = PacedServer()
    async with an_http_target(paced) as target:
        (answer,) = await open_loop(target, [ask], paced.clock)
    assert answer.time_to_first_token_s == pytest.approx(FIRST_S), "the chunk that says who speaks is no token"
    (body,) = paced.asked
    assert isinstance(body, dict)
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert "ignore_eos" not in body


class HeldTarget:
    """Answers none until `enough` are open at once."""

    name = "held"

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self._go = asyncio.Event()
        self.num_open = self.most_open = 0

    async def ask(self, ask: Ask, on_tokens: OnTokens) -> TokenCounts:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        if self.num_open == self._enough:
            self._go.set()
        async with asyncio.timeout(10):
            await self._go.wait()
        await asyncio.sleep(0)
        self.num_open -= 1
        on_tokens()
        return TokenCounts(1)

    async def close(self) -> None:
        pass


def errors_of(answers: Iterable[Answer]) -> list[str]:
    return [answer.error for answer in answers]


async def test_an_open_loop_waits_for_no_answer() -> None:
    target = HeldTarget(5)
    assert errors_of(await open_loop(target, [AN_ASK] * 5, SteppedClock())) == [""] * 5
    assert target.most_open == 5


async def test_a_closed_loop_keeps_so_many_open() -> None:
    target = HeldTarget(3)
    assert errors_of(await closed_loop(target, [AN_ASK] * 20, 3, SteppedClock())) == [""] * 20
    assert target.most_open == 3


@both
async def test_the_command_prints_figures_and_writes_json_and_a_plot(
    protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paced = PacedServer()
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")]
    what = ["--workload", "prefill", "--requests", "3", "--rate", "1000", "--slo-ttft-ms", "60000"]
    async with paced_gateway(paced) as address, paced_http(paced) as url:
        where = ["--gateways", address] if protocol == "grpc" else ["--url", url, "--vocab", "1000"]
        paced.clock.was_read = _at_once  # type: ignore[method-assign]  # the command has a clock of its own
        assert await asyncio.to_thread(main, ["bench", "serve", *where, *what, *files]) == 0
    assert len(paced.asked) == 1 + 3, "one to warm up"
    text = capsys.readouterr().out
    assert "3 requests" in text
    assert "0 failed" in text
    assert "40.0% of the prompts' tokens were in the server's cache" in text
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["summary"]["output_tokens"] == 3
    assert content["summary"]["good_share"] == 1.0
    assert len(content["requests"]) == 3
    assert (tmp_path / "out.svg").read_text().startswith("<svg")


async def _at_once() -> None:
    pass


async def test_what_is_written_names_the_file_of_requests_as_the_workload(tmp_path: Path) -> None:
    paced, asks, out = PacedServer(), tmp_path / "mine.jsonl", tmp_path / "out.json"
    asks.write_text('{"token_ids": [1, 2], "max_tokens": 1}\n' * 2)
    paced.clock.was_read = _at_once  # type: ignore[method-assign]
    async with paced_gateway(paced) as address:
        what = ["--gateways", address, "--input", str(asks), "--json", str(out)]
        assert await asyncio.to_thread(main, ["bench", "serve", *what]) == 0
    assert json.loads(out.read_text())["settings"]["workload"] == "mine.jsonl"


async def test_a_server_with_tls_is_measured_by_whoever_trusts_its_authority(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, paced = make_certificates(tmp_path), PacedServer()
    paced.clock.was_read = _at_once  # type: ignore[method-assign]
    async with paced_http(paced, files) as url:
        what = ["--url", url, "--vocab", "1000", "--workload", "prefill", "--requests", "1"]
        assert await asyncio.to_thread(main, ["bench", "serve", *what]) == 1
        assert "certificate verify failed" in capsys.readouterr().err.lower()
        assert await asyncio.to_thread(main, ["bench", "serve", *what, "--tls-ca", str(files.ca)]) == 0


def test_what_is_written_has_no_key(tmp_path: Path) -> None:
    files, out = make_certificates(tmp_path), tmp_path / "out.json"
    secrets = ["--tls-certificate", str(files.certificate), "--tls-key", str(files.key), "--api-key", "shoal_secret"]
    nobody = ["--gateways", "127.0.0.1:1", "--vocab", "1000", "--workload", "single", "--warmup", "0"]
    assert main(["bench", "serve", *nobody, "--tls-ca", str(files.ca), *secrets, "--json", str(out)]) == 1
    written = out.read_text()
    assert json.loads(written)["settings"]["tls"] is True
    assert "PRIVATE KEY" not in written
    assert "shoal_secret" not in written


@both
async def test_a_failed_request_is_the_commands_failure(
    protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paced = PacedServer(failures=["full"])
    paced.clock.was_read = _at_once  # type: ignore[method-assign]
    async with paced_gateway(paced) as address, paced_http(paced) as url:
        where = ["--gateways", address] if protocol == "grpc" else ["--url", url, "--vocab", "1000"]
        what = ["--workload", "prefill", "--requests", "2", "--warmup", "0", "--concurrency", "1"]
        files = ["--json", str(tmp_path / "out.json")]
        assert await asyncio.to_thread(main, ["bench", "serve", *where, *what, *files]) == 1
    assert "2 requests" in (text := capsys.readouterr().out)
    assert "1 failed" in text
    kind = {"grpc": "RESOURCE_EXHAUSTED BACKLOG_FULL", "http": "HTTP 429"}[protocol]
    assert json.loads((tmp_path / "out.json").read_text())["summary"]["errors"] == {kind: 1}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--rate", "0"], "--rate is 0.0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--url", "127.0.0.1:8000"], "--url is 127.0.0.1:8000; it looks like http://127.0.0.1:8000"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: there is no folder /nowhere"),
        (["--plot", "/nowhere/out.svg"], "--plot /nowhere/out.svg: there is no folder /nowhere"),
        (["--concurrency", "0"], "--concurrency is 0; the least is 1"),
        (["--url", "http://127.0.0.1:1", "--model", "m"], "give --vocab"),
        (["--url", "http://127.0.0.1:1", "--model", "m", "--vocab", "99", "--workload", "x"], "is none of single"),
        (["--url", "http://127.0.0.1:1"], "does not answer"),
        (["--url", "http://127.0.0.1:1", "--model", "m", "--input", "missing.jsonl"], "missing.jsonl can't be read"),
    ],
)
def test_what_cannot_be_measured_is_said(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 1
    assert problem in capsys.readouterr().err
