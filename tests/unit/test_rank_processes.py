"""The processes of a sharded worker meet at their start, and see when one of them stands still."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.worker.rank_beats import LINE_BYTES, RankBeats
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


class Watch:
    """Ranks that beat, and what each of them found."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(WORLD * LINE_BYTES))
        self.lost: list[tuple[int, int]] = []
        self.found = threading.Semaphore(0)

    def start(self, rank: int) -> RankBeats:
        def on_lost(other: int) -> None:
            self.lost.append((rank, other))
            self.found.release()

        return RankBeats(self.memory, rank, WORLD, on_lost, beat_s=0.02)


def test_a_rank_that_beats_no_more_is_lost_to_all_others_and_one_that_still_loads_to_none() -> None:
    watch = Watch()
    first, second = watch.start(0), watch.start(1)
    assert not watch.found.acquire(timeout=0.3), "rank 2 has not come yet"
    third = watch.start(2)
    while not watch.memory[2 * LINE_BYTES]:
        pass
    third.stop()
    assert watch.found.acquire(timeout=10)
    assert watch.found.acquire(timeout=10)
    assert sorted(watch.lost) == [(0, 2), (1, 2)]
    first.stop()
    second.stop()
