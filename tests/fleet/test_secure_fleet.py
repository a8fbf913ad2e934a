"""One fleet with TLS, mutual between its services, and required API keys: it answers who may ask, and nobody else."""

import json
import os
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shoal
from tests.fleet.conftest import Fleet, start_fleet
from tests.fleet.trace_receiver import TraceReceiver, trace_receiver

QUICK = shoal.RetryPolicy(outage_limit_s=1.0)
SERVICES = {"gateway", "tokenizer", "scheduler", "worker"}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def receiver() -> Iterator[TraceReceiver]:
    with trace_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def fleet(receiver: TraceReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two gateways, with metrics and traces; all that there is to log is logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_REQUIRE_KEYS", "true")
        patch.setenv("SHOAL_LOG_LEVEL", "DEBUG")
        patch.setenv("SHOAL_OTLP_ENDPOINT", receiver.endpoint)
        fleet = start_fleet(tmp_path_factory.mktemp("fleet"), "--tls", "--metrics", "--gateways", "2")
    yield fleet
    fleet.stop()


def files(fleet: Fleet) -> dict[str, str]:
    folder = fleet.state_dir / "tls"
    return {"ca": f"{folder}/ca.pem", "certificate": f"{folder}/service.pem", "key": f"{folder}/service.key"}


def trusting(fleet: Fleet) -> shoal.Tls:
    """All that a client needs."""
    return shoal.Tls(ca=files(fleet)["ca"])


def a_key(fleet: Fleet, *flags: str) -> dict[str, Any]:
    made = fleet.command("keys", "create", "--tenant", "acme", *flags)
    assert made.returncode == 0, made.stderr
    return dict(json.loads(made.stdout))


@pytest.fixture(scope="module")
def key(fleet: Fleet) -> str:
    return str(a_key(fleet)["key"])


def test_a_question_is_answered_over_tls_to_who_has_a_key(fleet: Fleet, key: str) -> None:
    with shoal.Client(fleet.gateways, tls=trusting(fleet), api_key=key) as client:
        assert "Paris" in client.generate(messages=QUESTION, temperature=0, max_tokens=12).read()


def test_who_has_no_key_or_calls_in_plain_is_not_served(fleet: Fleet, key: str) -> None:
    refused = pytest.raises(shoal.Unauthenticated, match="API key")
    with shoal.Client(fleet.gateways, tls=trusting(fleet)) as client, refused:
        client.generate("hello").read()
    with shoal.Client(fleet.gateways, api_key=key, retries=QUICK) as client, pytest.raises(shoal.Unavailable):
        client.list_models()


def test_a_stream_goes_on_at_another_gateway_with_certificate_and_key(fleet: Fleet, key: str) -> None:
    def ask(client: shoal.Client) -> shoal.Stream:
        return client.generate(messages=QUESTION, temperature=0, max_tokens=60, ignore_eos=True)

    with shoal.Client(fleet.gateways, tls=trusting(fleet), api_key=key) as client:
        undisturbed = ask(client).read()
        lines = len(fleet.lines)
        stream = ask(client)
        next(stream)
        for gateway in fleet.of_kind("gateway")[:1]:
            os.kill(gateway.pid, signal.SIGKILL)
        assert stream.read() == undisturbed
    fleet.await_lines(lines + 1)


def test_openais_client_needs_the_authority_and_the_key(fleet: Fleet, key: str) -> None:
    url = fleet.http_gateways[0].replace("http://", "https://")
    question: Any = QUESTION
    context = ssl.create_default_context(cafile=files(fleet)["ca"])
    with openai.DefaultHttpx2Client(verify=context) as http:
        answer = openai.OpenAI(base_url=url, api_key=key, http_client=http).chat.completions.create(
            model="smollm2-135m-instruct",
            messages=question,
            temperature=0,
            max_tokens=12,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="none", http_client=http).models.list()


@pytest.mark.parametrize("kind", ["tokenizer", "scheduler", "worker"])
def test_a_service_answers_only_who_shows_a_certificate_of_the_fleet(fleet: Fleet, kind: str) -> None:
    (service,) = fleet.of_kind(kind)
    ca, certificate, key = (Path(path).read_bytes() for path in files(fleet).values())
    of_the_fleet = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(service.address, of_the_fleet) as channel:
        assert health(channel) == health_pb2.HealthCheckResponse.SERVING
    for stranger in (grpc.secure_channel(service.address, grpc.ssl_channel_credentials(ca)),
                     grpc.insecure_channel(service.address)):  # fmt: skip
        with stranger as channel, pytest.raises(grpc.RpcError) as refused:
            health(channel)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def health(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status


def test_commands_find_the_authority_of_the_fleet_that_runs_here(fleet: Fleet, key: str) -> None:
    asked = ("--temperature", "0", "--max-tokens", "5", "The sea is")
    done = fleet.command("generate", "--api-key", key, *asked)
    assert (done.returncode, len(done.stdout.split())) == (0, 5), done.stderr
    elsewhere = ("--gateways", fleet.gateways[0], "--tls-ca", files(fleet)["ca"])
    assert fleet.command("generate", "--api-key", key, *elsewhere, *asked).stdout == done.stdout
    without = fleet.command("generate", *asked)
    assert without.returncode == 1
    assert "shoal keys create" in without.stderr
    wrong = fleet.command("generate", "--tls-ca", "/nothing", *asked)
    assert wrong.returncode == 1
    assert "/nothing cannot be read" in wrong.stderr
    assert json.loads(fleet.command("status").stdout)["tls"] == {"ca": files(fleet)["ca"]}


def test_its_figures_and_spans_tell_what_is_done_and_not_who_asked(
    fleet: Fleet, receiver: TraceReceiver, key: str
) -> None:
    traceparent = f"00-{'ad' * 16}-{'1' * 16}-01"
    with shoal.Client(fleet.gateways, tls=trusting(fleet), api_key=key) as client:
        stream = client.generate("The sea is", max_tokens=200, ignore_eos=True, traceparent=traceparent)
        next(stream)
        shown = json.loads(fleet.command("top", "--once", "--json", "--interval-s", "0.5").stdout)
        stream.cancel()
        stream.read()
    assert (shown["open_streams"], shown["leaders"], shown["away"], len(shown["workers"])) == (1, 1, [], 1)
    told = fleet.command("trace", "--api-key", key, stream.request_id)
    assert f"trace {'ad' * 16}" in told.stdout, told.stderr
    refused = fleet.command("trace", stream.request_id)
    assert (refused.returncode, "shoal keys create" in refused.stderr) == (1, True)
    spans = receiver.trace("ad" * 16, lambda spans: {span.service for span in spans} >= SERVICES)
    secrets = ("acme", key)
    assert not [span for span in spans if any(secret in str(span) for secret in secrets)]
    measured = [process for process in fleet.processes if process.metrics_address]
    assert {process.kind for process in measured} == SERVICES
    for process in measured:
        with urllib.request.urlopen(f"http://{process.metrics_address}/metrics", timeout=5) as response:
            exposed = str(response.read(), "utf-8")
        assert "shoal_" in exposed
        assert not any(secret in exposed for secret in secrets)


def test_a_key_allows_so_many_requests_at_once_and_ends_when_it_is_revoked(fleet: Fleet) -> None:
    made = a_key(fleet, "--max-in-flight", "1")
    with shoal.Client(fleet.gateways, tls=trusting(fleet), api_key=made["key"]) as client:
        with client.generate("The sea is", max_tokens=200, ignore_eos=True) as stream:
            next(stream)
            with pytest.raises(shoal.Exhausted, match="1 requests in flight"):
                client.generate("hello", max_tokens=1).read()
        assert fleet.command("keys", "revoke", made["key_id"]).returncode == 0
        with pytest.raises(shoal.Unauthenticated):
            _call_until_refused(client)


def _call_until_refused(client: shoal.Client) -> None:
    for _ in range(10_000):
        client.list_models()


# The last, for it reads what all the others left behind.


PLANTED = "Zanzibar quokka"
"""Words that no other text has."""


def test_no_log_has_a_prompt_an_answer_or_a_key_whatever_failed(fleet: Fleet, key: str) -> None:
    answers = []
    with shoal.Client(fleet.gateways, tls=trusting(fleet), api_key=key) as client:
        answers.append(client.generate(f"{PLANTED} one, two, three,", temperature=0, max_tokens=24).read())
        for fails in (
            {"prompt": PLANTED, "max_tokens": 100_000},
            {"prompt": PLANTED, "temperature": -1},
            {"prompt": f"{PLANTED} " * 5_000},
            {"prompt": PLANTED, "model": PLANTED},
            {"prompt": PLANTED, "stop": [f"{PLANTED} " * 50]},
            {"prompt": PLANTED, "response_format": {"regex": f"[{PLANTED}"}},
            {"messages": [{"role": PLANTED, "content": PLANTED}]},
        ):
            with pytest.raises(shoal.ShoalError):
                client.generate(**fails).read()
        lines = len(fleet.lines)
        stream = client.generate(PLANTED, temperature=0, max_tokens=60, ignore_eos=True)
        next(stream)
        os.kill(fleet.of_kind("engine")[0].pid, signal.SIGKILL)
        answers.append(stream.read())
        fleet.await_lines(lines + 1)
        lines = len(fleet.lines)
        os.kill(fleet.of_kind("tokenizer")[0].pid, signal.SIGKILL)
        fleet.await_lines(lines + 1)
        assert client.count_tokens(PLANTED)
    _fail_over_http(fleet, key)
    logs = {path.name: path.read_text(errors="replace") for path in (fleet.state_dir / "log").glob("*.log")}
    assert {"gateway-0.log", "gateway-1.log", "tokenizer-0.log", "scheduler-0.log", "worker-0.log"} <= set(logs)
    assert '"level": "debug"' in "".join(logs.values()), "all that can be logged was"
    assert "accepted" in logs["gateway-0.log"] + logs["gateway-1.log"]
    secrets = [PLANTED.split()[1], key.split("_")[2], Path(files(fleet)["key"]).read_text().splitlines()[1]]
    secrets += [answer.strip()[:30] for answer in answers]
    for name, text in logs.items():
        for secret in secrets:
            assert secret not in text, f"{name} has {secret!r}"
    assert PLANTED not in (fleet.state_dir / "fleet.json").read_text()


def _fail_over_http(fleet: Fleet, key: str) -> None:
    context = ssl.create_default_context(cafile=files(fleet)["ca"])
    url = fleet.http_gateways[0].replace("http://", "https://") + "/completions"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    for body in (f'{{"prompt": "{PLANTED}", "best_of": 7}}', f'{{"prompt": "{PLANTED}"', f'{{"{PLANTED}": 1}}'):
        request = urllib.request.Request(url, body.encode(), headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, context=context, timeout=10)
        refused.value.close()
