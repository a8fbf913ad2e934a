"""A plan comes to every other rank as it was, however large, or the ranks learn that it does not."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.fleet.v1 import rank_pb2
from services.worker.engine.block_pool import BlockId
from services.worker.engine.runner import RanksLostError
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import PENDING_TOKEN, BlockCopy, SeenTokens, SequenceChunk, StepPlan
from services.worker.plan_message import plan_message, plan_of
from services.worker.plan_ring import NUM_SLOTS, SLOT_BYTES, PlanReader, PlanWriter, ring_bytes

numbers = st.integers(0, 2**32 - 1)
tokens = st.lists(numbers, max_size=5).map(tuple)
values = st.floats(allow_nan=False, allow_infinity=False)
optional_numbers = st.none() | st.integers(0, 20)
sampling = st.builds(
    SamplingParameters,
    values,
    numbers,
    values,
    values,
    st.integers(0, 2**64 - 1),
    numbers,
    values,
    values,
    values,
    st.lists(st.tuples(numbers, values), max_size=3).map(tuple),
    optional_numbers,
    optional_numbers,
)
blocks = st.lists(numbers.map(BlockId), max_size=5).map(tuple)
chunks = st.builds(
    SequenceChunk,
    st.integers(1, 2**64 - 1).map(SequenceId),
    tokens | tokens.map(lambda known: (*known, PENDING_TOKEN)),
    numbers,
    blocks,
    sampling,
    optional_numbers,
    tokens,
    st.none() | st.builds(SeenTokens, tokens, tokens),
    st.none() | st.binary(max_size=9),
)
copies = st.builds(BlockCopy, numbers.map(BlockId), numbers.map(BlockId))
plans = st.builds(
    StepPlan,
    st.integers(0, 2**64 - 1),
    st.lists(chunks, max_size=4).map(tuple),
    st.lists(copies, max_size=3).map(tuple),
)


@given(plans)
def test_a_plan_is_read_back_as_it_was(plan: StepPlan) -> None:
    data = plan_message(plan).SerializeToString()
    assert plan_of(rank_pb2.RankPlan.FromString(data)) == plan


@dataclass
class Ring:
    """Rank 0 and two others."""

    writer: PlanWriter
    readers: list[PlanReader]
    sockets: list[socket.socket]
    front: socket.socket


@pytest.fixture
def ring() -> Iterator[Ring]:
    memory = memoryview(bytearray(ring_bytes(3)))
    pairs = [socket.socketpair() for _ in (1, 2)]
    fronts = [socket.socketpair() for _ in (1, 2)]
    readers = [PlanReader(memory, rank, pairs[rank - 1][1], fronts[rank - 1][1]) for rank in (1, 2)]
    sockets = [end for pair in (*pairs, *fronts) for end in pair]
    yield Ring(PlanWriter(memory, [first for first, _ in pairs]), readers, sockets, fronts[0][0])
    for end in sockets:
        end.close()


def plan_of_bytes(step: int, num_bytes: int) -> StepPlan:
    chunk = SequenceChunk(
        SequenceId(1), (1,), 0, (BlockId(0),), SamplingParameters(), 0, allowed_tokens=bytes(num_bytes)
    )
    return StepPlan(step, (chunk,))


def test_plans_of_one_part_and_of_more_than_the_ring_holds_come_to_every_rank_in_order(ring: Ring) -> None:
    sent = [plan_of_bytes(step, size) for step, size in enumerate((10, 2 * NUM_SLOTS * SLOT_BYTES, 0, SLOT_BYTES), 1)]
    sent.insert(1, StepPlan(0, ()))
    taken: list[list[StepPlan | None]] = [[], []]

    def take(rank: int) -> None:
        taken[rank].extend(ring.readers[rank].take() for _ in sent)

    threads = [threading.Thread(target=take, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for plan in sent:
        ring.writer.send(plan)
    for thread in threads:
        thread.join(30)
    assert taken == [sent, sent]


def test_a_rank_that_takes_no_plans_is_waited_for_only_so_long(ring: Ring) -> None:
    with pytest.raises(RanksLostError, match="rank 1 does not take its plans"):
        ring.writer.send(plan_of_bytes(1, 2 * NUM_SLOTS * SLOT_BYTES))


def test_a_rank_that_is_gone_is_named(ring: Ring) -> None:
    assert not ring.writer.is_a_rank_gone()
    ring.sockets[3].close()
    assert ring.writer.is_a_rank_gone()
    with pytest.raises(RanksLostError, match="rank 2 is gone"):
        ring.writer.send(plan_of_bytes(1, 1))


def test_no_plan_comes_when_rank_0_or_the_front_is_gone(ring: Ring) -> None:
    ring.front.close()
    assert ring.readers[0].take() is None
    ring.sockets[2].close()
    assert ring.readers[1].take() is None
