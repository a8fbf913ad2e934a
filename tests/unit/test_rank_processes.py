"""The processes of a sharded worker meet at their start, and see when one of them stands still."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.worker.rank_beats import LINE_BYTES, LOOKS_WITHOUT_BEAT, RankBeats
from services.worker.rank_board import RankBoard
from services.worker.rank_file import RankFile

WORLD = 3


@pytest.fixture
def fd() -> Iterator[int]:
    memory = os.memfd_create("ranks")
    yield memory
    os.close(memory)


def test_every_rank_learns_what_each_told_time_after_time(fd: int) -> None:
    files = [RankFile(fd, rank, WORLD) for rank in range(WORLD)]

    def told_to(file: RankFile) -> list[list[bytes]]:
        return [file.board.exchange(f"{turn} of {file.rank}".encode()) for turn in range(50)]

    with ThreadPoolExecutor(WORLD) as threads:
        told = list(threads.map(told_to, files))
    assert told == [[[f"{turn} of {rank}".encode() for rank in range(WORLD)] for turn in range(50)]] * WORLD


def test_a_rank_that_says_nothing_is_named_after_a_while() -> None:
    memory = memoryview(bytearray(RankBoard.num_bytes(2)))
    with pytest.raises(TimeoutError, match="rank 1 said nothing"):
        RankBoard(memory, 0, 2, patience_s=0.01).exchange(b"here")


def test_what_one_rank_maps_later_is_the_same_for_all(fd: int) -> None:
    first, second = RankFile(fd, 0, 2), RankFile(fd, 1, 2)
    longer = first.more(100_000)
    longer[99_999] = 7
    assert second.more(100_000)[99_999] == 7
    second.beats[0] = 5
    assert first.beats[0] == 5
    assert longer[:99_999] == bytes(99_999)


def test_a_rank_that_beats_no_more_is_lost_to_all_others_and_one_that_still_loads_to_none() -> None:
    memory = memoryview(bytearray(WORLD * LINE_BYTES))
    first, second, third = (RankBeats(memory, rank, WORLD) for rank in range(WORLD))
    for _ in range(3 * LOOKS_WITHOUT_BEAT):
        assert [first.beat_and_look(), second.beat_and_look()] == [None, None], "rank 2 has not come yet"
    for _ in range(3 * LOOKS_WITHOUT_BEAT):
        assert [each.beat_and_look() for each in (third, first, second)] == [None] * 3
    for _ in range(LOOKS_WITHOUT_BEAT - 1):
        assert [first.beat_and_look(), second.beat_and_look()] == [None, None]
    assert [first.beat_and_look(), second.beat_and_look()] == [2, 2]


def test_a_watch_calls_when_a_rank_stands_still() -> None:
    memory = memoryview(bytearray(2 * LINE_BYTES))
    RankBeats(memory, 1, 2).beat_and_look()
    lost: list[int] = []
    called = threading.Event()
    watch = RankBeats(memory, 0, 2)

    def on_lost(rank: int) -> None:
        lost.append(rank)
        called.set()

    watch.start(on_lost)
    assert called.wait(60)
    assert lost == [1]
