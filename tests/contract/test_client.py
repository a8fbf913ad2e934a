"""The client library against gateways that break: what its users are promised, blocking and in asyncio alike."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import shoal
from tests.contract.fake_fleet import NUM_TOKENS, FakeFleet, running

QUICK = shoal.RetryPolicy(outage_limit_s=5, first_delay_s=0.001, longest_delay_s=0.02)


@contextmanager
def a_client(fleet: FakeFleet, retries: shoal.RetryPolicy = QUICK, num_gateways: int = 2) -> Iterator[shoal.Client]:
    with running(fleet, num_gateways) as gateways, shoal.Client(gateways, retries=retries) as client:
        yield client


def check_whole(deltas: list[shoal.Delta], tokens: list[int]) -> None:
    """Each index once, in order; tokens and text as generated."""
    got: list[int] = []
    for delta in deltas:
        assert delta.index == len(got)
        got += delta.token_ids
    assert got == tokens
    assert "".join(delta.text for delta in deltas) == "".join(f"<{token}>" for token in tokens)


@pytest.mark.parametrize("seed", range(10))
def test_an_answer_is_whole_although_its_streams_break(seed: int) -> None:
    fleet = FakeFleet(seed=seed, chance_to_break=0.15)
    with a_client(fleet) as client:
        for _ in range(5):
            stream = client.generate("hello")
            deltas = list(stream)
            check_whole(deltas, list(fleet.requests[stream.request_id].tokens))
            assert stream.finished is not None
            assert stream.finished.reason is shoal.FinishReason.LENGTH
            assert stream.finished.usage.completion_tokens == NUM_TOKENS
    assert fleet.num_breaks > 0
    assert len(fleet.requests) == 5


@pytest.mark.parametrize("seed", range(10))
async def test_an_answer_is_whole_in_asyncio_too(seed: int) -> None:
    fleet = FakeFleet(seed=seed, chance_to_break=0.15)
    with running(fleet) as gateways:
        async with shoal.AsyncClient(gateways, retries=QUICK) as client:

            async def ask() -> None:
                stream = client.generate(messages=[{"role": "user", "content": "hello"}])
                deltas = [delta async for delta in stream]
                check_whole(deltas, list(fleet.requests[stream.request_id].tokens))

            async with asyncio.TaskGroup() as tasks:
                for _ in range(5):
                    tasks.create_task(ask())
    assert fleet.num_breaks > 0
    assert len(fleet.requests) == 5


def test_a_gateway_that_is_not_there_costs_nothing_but_a_try() -> None:
    fleet = FakeFleet()
    with running(fleet, 1) as gateway, shoal.Client(f"127.0.0.1:1,{gateway}", retries=QUICK) as client:
        for _ in range(4):
            assert len(client.generate("hello").read()) > 0
        assert client.count_tokens("one two") == 2


def test_a_fleet_that_is_away_is_an_error_after_the_outage_limit() -> None:
    policy = shoal.RetryPolicy(outage_limit_s=0.5)
    with shoal.Client("127.0.0.1:1", retries=policy) as client:
        began = time.monotonic()
        with pytest.raises(shoal.Unavailable):
            client.generate("hello").read()
        assert time.monotonic() - began < 5


def test_a_full_queue_is_an_error_with_the_time_to_come_back() -> None:
    fleet = FakeFleet(refusals=[shoal.Exhausted("the queue is full", reason="BACKLOG_FULL", retry_after_ms=30)])
    with a_client(fleet) as client:
        with pytest.raises(shoal.Exhausted) as caught:
            client.generate("hello").read()
        assert (caught.value.reason, caught.value.retry_after_ms) == ("BACKLOG_FULL", 30)
        assert client.generate("hello").read()


def test_a_full_queue_is_waited_for_if_asked() -> None:
    fleet = FakeFleet(refusals=[shoal.Exhausted("full", retry_after_ms=30)] * 3)
    with a_client(fleet, shoal.RetryPolicy(retry_exhausted=True)) as client:
        began = time.monotonic()
        assert client.generate("hello").read()
        assert time.monotonic() - began >= 0.09


def test_an_id_used_for_another_question_is_refused() -> None:
    with a_client(FakeFleet()) as client:
        client.generate("hello", request_id="mine").read()
        with pytest.raises(shoal.AlreadyExists):
            client.generate("good-bye", request_id="mine").read()


def test_another_client_attaches_where_the_first_left() -> None:
    fleet = FakeFleet(pause_s=0.005)
    with a_client(fleet) as client:
        with client.generate("hello", request_id="mine") as stream:
            first = [next(stream), next(stream)]
        held = stream.token_ids
        rest = list(client.attach("mine", len(held), held))
        check_whole(first + rest, list(fleet.requests["mine"].tokens))
        with pytest.raises(shoal.Aborted) as caught:
            client.attach("mine", 2, [1, 2]).read()
        assert caught.value.reason == "DIVERGED"
        with pytest.raises(shoal.NotFound):
            client.attach("never was").read()


def test_cancelling_ends_the_stream_with_its_end() -> None:
    with a_client(FakeFleet(pause_s=0.02)) as client:
        stream = client.generate("hello")
        next(stream)
        threading.Timer(0.05, stream.cancel).start()
        stream.read()
        assert stream.finished is not None
        assert stream.finished.reason is shoal.FinishReason.CANCELLED


async def test_cancelling_before_acceptance_holds_after_it() -> None:
    fleet = FakeFleet(pause_s=0.01, refusals=[shoal.Unavailable("draining", retry_after_ms=100)])
    with running(fleet) as gateways:
        async with shoal.AsyncClient(gateways, retries=QUICK) as client:
            stream = client.generate("hello")
            await stream.cancel()
            await stream.read()
            assert stream.finished is not None
            assert stream.finished.reason is shoal.FinishReason.CANCELLED


def test_leaving_a_stream_cancels_it_unless_its_id_was_chosen() -> None:
    fleet = FakeFleet(pause_s=0.01)
    with a_client(fleet) as client:
        with client.generate("hello") as dropped:
            next(dropped)
        with client.generate("hello", request_id="kept") as kept:
            next(kept)
        assert fleet.requests[dropped.request_id].cancelled
        assert not fleet.requests["kept"].cancelled


async def test_a_reader_that_times_out_may_read_on() -> None:
    fleet = FakeFleet(pause_s=0.01)
    with running(fleet) as gateways:
        async with shoal.AsyncClient(gateways, retries=QUICK) as client:
            stream = client.generate("hello")
            deltas = []
            while stream.finished is None:
                try:
                    async with asyncio.timeout(0.035):
                        async for delta in stream:
                            deltas.append(delta)  # noqa: PERF401 - what came before the timeout counts
                except TimeoutError:
                    continue
            check_whole(deltas, list(fleet.requests[stream.request_id].tokens))


def test_the_other_calls() -> None:
    with a_client(FakeFleet(seed=3, chance_to_break=0.3)) as client:
        assert client.list_models() == [shoal.Model("fake", 64, 49152)]
        assert client.count_tokens("one two three") == 3
        assert client.count_tokens(messages=[{"role": "user", "content": "hi"}]) == 10
        stream = client.generate("hello")
        stream.read()
        info = client.get_request(stream.request_id)
        assert info.state is shoal.RequestState.RUNNING
        assert info.decisions == (shoal.Decision(1, "placed", 1, "w-1"),)
        assert info.timings is None
        with pytest.raises(shoal.Exhausted):
            client.count_tokens("full")


async def test_the_other_calls_in_asyncio() -> None:
    with running(FakeFleet()) as gateways:
        async with shoal.AsyncClient(gateways) as client:
            assert await client.list_models() == [shoal.Model("fake", 64, 49152)]
            assert await client.count_tokens("one two three") == 3
            with pytest.raises(shoal.NotFound):
                await client.get_request("never was")


@pytest.mark.parametrize("gateways", ["", " , ", "localhost", "a:1,b"])
def test_an_address_that_is_none_is_refused_at_once(gateways: str) -> None:
    with pytest.raises(ValueError, match="gateway"):
        shoal.Client(gateways)


def test_exactly_one_input_is_taken() -> None:
    with shoal.Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="exactly one"):
            client.generate()
        with pytest.raises(TypeError, match="exactly one"):
            client.generate("hello", token_ids=[1])
