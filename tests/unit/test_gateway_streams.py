"""What waits for a slow client is joined, complete, and bounded; what workers ask too early is answered later."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from gen.shoal.fleet.v1 import delivery_pb2
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import Aborted, Unavailable
from services.common.ids import RequestKey
from services.common.record.history import Held
from services.common.record.reader import Acceptance, Reader
from services.common.record.record import Attempt
from services.common.store.requests import RequestStore
from services.common.store.workers import WorkerDirectory
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import NoTracer
from services.gateway.delivery import DeliveryService
from services.gateway.departures import Departures
from services.gateway.hints import Hints
from services.gateway.metrics import GatewayMetrics
from services.gateway.open_streams import OpenStreams
from services.gateway.streams import Accepted, Stream
from services.gateway.wakes import FEW, Wakes
from tests.unit.eventually import eventually

KEY = RequestKey("default/a")
FIRST = Attempt(1, "n")


def a_stream(number: int = 1, num_choices: int = 1, held: Sequence[Held] = ()) -> Stream:
    accepted = Accepted(KEY, b"", 3, "digest", 1, 0, 30_000, "")
    stream = Stream(accepted, Reader(number, num_choices, held), NoTracer().begin("call", ""), now_s=0)
    assert stream.open(FIRST, number) is None
    return stream


def a_delta(index: int, tokens: Sequence[int], choice: int = 0, *, with_logprobs: bool = False) -> pb.Delta:
    told = [pb.TokenLogprobs(logprob=-token, top=[pb.TokenLogprob(token_id=token)]) for token in tokens]
    text = "".join(f"<{token}>" for token in tokens)
    return pb.Delta(choice=choice, index=index, text=text, token_ids=tokens, logprobs=told if with_logprobs else ())


async def deltas_of(stream: Stream) -> list[pb.Delta]:
    """Everything that the client gets, read at once."""
    return [each.delta async for each in stream.responses() if each.WhichOneof("event") == "delta"]


@given(
    pieces=st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 99), min_size=1, max_size=4)), max_size=300),
    with_logprobs=st.booleans(),
)
def test_a_client_that_reads_late_gets_all_of_it_in_one_delta_a_choice(
    pieces: list[tuple[int, list[int]]], with_logprobs: bool
) -> None:
    stream = a_stream(num_choices=2, held=(Held(7), Held(0)))
    counts, tokens = [7, 0], ([], [])  # type: tuple[list[int], tuple[list[int], list[int]]]
    for choice, piece in pieces:
        delta = a_delta(counts[choice], piece, choice, with_logprobs=with_logprobs)
        assert stream.take(FIRST, delta, 1) is Acceptance.NEW
        counts[choice] += len(piece)
        tokens[choice].extend(piece)
    stream.finish(pb.Finished())
    deltas = asyncio.run(deltas_of(stream))
    assert [delta.choice for delta in deltas] == [choice for choice in (0, 1) if tokens[choice]]
    for delta in deltas:
        whole = tokens[delta.choice]
        assert delta == a_delta((7, 0)[delta.choice], whole, delta.choice, with_logprobs=with_logprobs)


def test_what_waits_takes_no_more_than_its_text_and_tokens() -> None:
    stream = a_stream()
    for index in range(5_000):
        stream.take(FIRST, a_delta(index, [7]), 1)
    assert stream.num_waiting_bytes == 5_000 * (len("<7>") + 4)


def test_log_probabilities_that_wait_are_counted_until_they_are_sent() -> None:
    stream = a_stream()
    for index in range(100):
        stream.take(FIRST, a_delta(index, [7], with_logprobs=True), 1)
    each = a_delta(0, [7], with_logprobs=True).logprobs[0].ByteSize()
    assert stream.num_waiting_bytes == 100 * (len("<7>") + 4 + each)
    stream.finish(pb.Finished())
    asyncio.run(deltas_of(stream))
    assert stream.num_waiting_bytes == 0


async def test_tokens_that_come_while_the_client_is_sent_others_go_in_front_of_the_end() -> None:
    stream = a_stream()
    stream.take(FIRST, a_delta(0, [1]), 1)
    stream.wake()
    seen = []
    async for response in stream.responses():
        seen.append(response.WhichOneof("event"))
        if len(seen) == 2:
            stream.take(FIRST, a_delta(1, [2]), 1)
            stream.finish(pb.Finished())
    assert seen == ["accepted", "delta", "delta", "finished"]


def test_the_first_end_counts_and_nothing_follows_it() -> None:
    stream = a_stream()
    stream.finish(Aborted("superseded"))
    stream.finish(pb.Finished())
    assert isinstance(stream.end, Aborted)
    assert stream.take(FIRST, a_delta(0, [1]), 1) is Acceptance.REFUSED
    assert stream.open(Attempt(2, "m"), 1) is not None


def test_only_an_end_that_the_record_does_not_know_leaves_a_reader_to_be_told() -> None:
    ended, drained = a_stream(), a_stream()
    ended.finish(pb.Finished())
    drained.finish(Unavailable("drains"))
    assert (ended.settled, drained.settled, a_stream().settled) == (True, False, False)


def test_of_two_streams_of_a_request_the_one_with_the_higher_number_stays() -> None:
    for first, second in ((1, 2), (2, 1)):
        streams, by_number = OpenStreams(), {number: a_stream(number) for number in (1, 2)}
        streams.install(by_number[first])
        streams.install(by_number[second])
        assert streams.get(KEY) is by_number[2]
        assert isinstance(by_number[1].end, Aborted)
        streams.remove(by_number[1])
        assert streams.get(KEY) is by_number[2]


def test_what_is_asked_of_an_arriving_request_is_answered_when_it_has_settled() -> None:
    streams = OpenStreams()
    asked: list[str] = []
    with streams.arriving(KEY), streams.arriving(KEY):
        assert streams.is_arriving(KEY)
        streams.when_settled(KEY, "worker", lambda: asked.append("first"))
        streams.when_settled(KEY, "worker", lambda: asked.append("last"))
        assert not asked
    assert asked == ["last"], "once, and as it was asked last"
    assert not streams.is_arriving(KEY)


async def _next(link: AsyncIterator[delivery_pb2.DeliverResponse]) -> delivery_pb2.DeliverResponse:
    return await anext(link)


class ACall:
    """A worker's call, as far as the gateway's side of it looks."""

    def __init__(self) -> None:
        self.when_done: list[Callable[[object], object]] = []

    def add_done_callback(self, callback: Callable[[object], object]) -> None:
        self.when_done.append(callback)


async def test_a_worker_that_asks_too_early_under_a_number_that_redis_gave_again_is_answered_later() -> None:
    streams, stream = OpenStreams(), a_stream(number=5)
    streams.install(stream)
    call = ACall()
    wishes: asyncio.Queue[delivery_pb2.DeliverRequest] = asyncio.Queue()

    async def messages() -> AsyncIterator[delivery_pb2.DeliverRequest]:
        while True:
            yield await wishes.get()

    async with asyncio.TaskGroup() as tasks:
        departures = Departures(RequestStore(Redis(), "unused", 1))
        hints = Hints(WorkerDirectory(Redis(), "unused"))
        metrics = GatewayMetrics(Metrics(), lambda: 0, lambda: 0.0)
        service = DeliveryService(streams, departures, hints, Wakes(lambda: 0.0), tasks, metrics, lambda: 0.0)
        link = service.Deliver(messages(), call)
        answer = tasks.create_task(_next(link))
        with streams.arriving(KEY):
            attempt = delivery_pb2.AttemptId(number=FIRST.number, nonce=FIRST.nonce)
            wish = delivery_pb2.Open(key=KEY, attempt=attempt, reader=3)
            wishes.put_nowait(delivery_pb2.DeliverRequest(opens=[wish]))
            while not wishes.empty():
                await asyncio.sleep(0)
            stream.reader.number = 3
        assert [resume.key for resume in (await answer).resumes] == [KEY]
        for callback in call.when_done:
            callback(call)


NUM_STEPS = 20


async def deltas_of_steps(num_streams: int) -> list[int]:
    """Give each stream a token a step, one step right after the other; how many deltas each was sent them in."""
    streams, wakes = [a_stream() for _ in range(num_streams)], Wakes(lambda: 0.0)

    async def read(stream: Stream) -> list[list[int]]:
        return [list(response.delta.token_ids) async for response in stream.responses() if response.HasField("delta")]

    async with asyncio.TaskGroup() as tasks:
        reading = [tasks.create_task(read(stream)) for stream in streams]
        waking = tasks.create_task(wakes.run())
        for index in range(NUM_STEPS):
            for stream in streams:
                assert stream.take(FIRST, a_delta(index, [7]), 1) is Acceptance.NEW
                wakes.add(stream)
            for _ in range(4):  # The streams that are woken at once have sent by then.
                await asyncio.sleep(0)
        await eventually(lambda: not any(stream.num_waiting_bytes for stream in streams))
        for stream in streams:
            stream.finish(pb.Finished())
        waking.cancel()
    for task in reading:
        assert [token for delta in task.result() for token in delta] == [7] * NUM_STEPS
    return [len(task.result()) for task in reading]


async def test_while_tokens_come_in_for_many_streams_they_are_kept_and_go_out_together() -> None:
    # One delta, unless this process was held up in between.
    assert max(await deltas_of_steps(FEW + 1)) <= NUM_STEPS // 2


async def test_a_few_streams_wait_for_nothing() -> None:
    assert await deltas_of_steps(FEW) == [NUM_STEPS] * FEW
