"""How the ranks of a worker give each other values inside of kernels, through memory of each device that all can write.

A rank stores what it gives into the memory of each other one, in words of 8 bytes: a value beside the number of the
meeting. A word comes whole, so that its number says that its value is there: no fence, no flag behind the values, and
one way over the link (the protocol that NCCL calls LL). Twice the bytes, which is why large sums are NCCL's.

Programs meet one by one, each at its place, and count their meetings there. A place has two slots, used in turn: a
rank fills one again only after a meeting at that place which the others came to when they had read it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's seat where programs of one kind meet."""

    rank: int
    world_size: int
    addresses: Tensor
    """Where the words of each rank are, as this one reaches them: [world_size] int64. A rank's are
    [2 slots, num_places, world_size, num_words] int64, zeros at first; the last but one is who gave them."""
    counts: Tensor
    """Meetings that programs have been to at each place: [num_places] int32, zeros at first."""
    num_words: int
    """That a rank gives at a place."""
    state: Tensor
    """[STATE_SIZE] int32, of all seats of the rank"""

    @property
    def num_places(self) -> int:
        """The most programs of a launch."""
        return len(self.counts)

    @staticmethod
    def words_of(size: int, dtype: torch.dtype) -> int:
        """Return the words that a row of a sum takes."""
        return size * dtype.itemsize // 4

    @staticmethod
    def num_bytes(num_places: int, world_size: int, num_words: int) -> int:
        """Return what a rank's words take."""
        return 2 * num_places * world_size * num_words * 8


def seat_arguments(seat: Seat | None) -> tuple[Tensor | int | None, ...]:
    """Return what a kernel is told of a seat: addresses, counts, state, num_places. None: it meets nobody."""
    return (seat.addresses, seat.counts, seat.state, seat.num_places) if seat else (None,) * 4


MOST_LOOKS, BROKEN = 0, 1
STATE_SIZE = 2
"""The state: how often a program looks for what another rank gives; and 0, or what was seen first of LOST and
DIFFERENT: from then on nobody waits, and what is computed means nothing."""
LOST, DIFFERENT = 1, 2
_LOST = tl.constexpr(LOST)
_MOST_LOOKS = tl.constexpr(MOST_LOOKS)
_BROKEN = tl.constexpr(BROKEN)


@triton.jit
def slot_of(counts, place, num_places, size, WORLD: tl.constexpr):
    """Return the number of a place's next meeting, and where its words begin."""
    number = tl.load(counts + place) + 1
    return number, ((number & 1).to(tl.int64) * num_places + place) * WORLD * size


@triton.jit
def words_of(rank, addresses):
    """Return where the words of a rank begin."""
    # Said so that a thread takes two words at once.
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def give(bits, words, inside, number, addresses, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Store values, int32, at some words of every other rank."""
    packed = (number.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(WORLD):
        if rank != RANK:
            tl.store(words_of(rank, addresses) + words, packed, inside)


@triton.jit
def give_outputs(
    values,
    rows,
    inside,
    first_column,
    num_columns,
    addresses,
    counts,
    num_places,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
):
    """Give columns from `first_column` on, an even one, of rows: [ROWS, COLUMNS] float32, of TYPE when they are given.

    A product does so as soon as it has them; the norm that takes the rows (`sum_over_ranks`) gives nothing then, and
    counts the meeting. rows, inside: [ROWS], the places, and whether there is such a row.
    """
    VALUES: tl.constexpr = 32 // TYPE.primitive_bitwidth
    num_words = num_columns // VALUES
    number, slot = slot_of(counts, tl.where(inside, rows, 0), num_places, num_words, WORLD)
    words = first_column // VALUES + tl.arange(0, COLUMNS // VALUES)
    if VALUES == 2:
        first, second = tl.split(tl.reshape(values.to(TYPE), [ROWS, COLUMNS // 2, 2]))
        bits = _two(first, second)
    else:
        bits = values.to(tl.int32, bitcast=True)
    places = slot[:, None] + RANK * num_words + words[None, :]
    give(bits, places, inside[:, None] & (words < num_words)[None, :], number[:, None], addresses, RANK, WORLD)


@triton.jit
def take(words, inside, number, addresses, state, RANK: tl.constexpr):
    """Wait until some words of this rank are there, and return their values, int32.

    Words are read as often as the state says; then ranks are lost to each other.
    """
    places = words_of(RANK, addresses) + words
    packed = tl.load(places, inside, other=0, volatile=True)
    num_missing = tl.sum((inside & ((packed >> 32).to(tl.int32) != number)).to(tl.int32))
    looks = tl.where(tl.load(state + _BROKEN, volatile=True) == 0, tl.load(state + _MOST_LOOKS), 0)
    while (num_missing > 0) & (looks > 0):
        packed = tl.load(places, inside, other=0, volatile=True)
        num_missing = tl.sum((inside & ((packed >> 32).to(tl.int32) != number)).to(tl.int32))
        looks -= 1
    if num_missing > 0:
        note(state, _LOST)
    return packed.to(tl.int32)


@triton.jit
def note(state, what):
    """Say what is broken, if nothing was before."""
    if tl.load(state + _BROKEN, volatile=True) == 0:
        tl.store(state + _BROKEN, what)


@triton.jit
def sum_over_ranks(
    own,
    place,
    size,
    addresses,
    counts,
    state,
    num_places,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    GIVES: tl.constexpr,
):
    """Return the sum of what each rank gives, [BLOCK] float32, of which the first `size` count; size is even.

    It is added in the order of ranks: the same bits on all of them. Of values of 16 bits, TYPE, a word has two. Unless
    GIVES, this rank's were given before, by the product that made them.
    """
    VALUES: tl.constexpr = 32 // TYPE.primitive_bitwidth
    words = tl.arange(0, BLOCK // VALUES)
    num_words = size // VALUES
    inside = words < num_words
    number, slot = slot_of(counts, place, num_places, num_words, WORLD)
    if VALUES == 2:
        first, second = tl.split(tl.reshape(own.to(TYPE), [BLOCK // 2, 2]))
        bits = _two(first, second)
    else:
        bits = own.to(tl.int32, bitcast=True)
    total = tl.zeros([BLOCK // VALUES], tl.float32)
    total_of_second = tl.zeros([BLOCK // VALUES], tl.float32)
    if GIVES:
        give(bits, slot + RANK * num_words + words, inside, number, addresses, RANK, WORLD)
    for rank in tl.static_range(WORLD):
        given = bits
        if rank != RANK:
            given = take(slot + rank * num_words + words, inside, number, addresses, state, RANK)
        if VALUES == 2:
            total += (given & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
            total_of_second += (given >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
        else:
            total += given.to(tl.float32, bitcast=True)
    # Behind the waiting, which no thread of the program leaves before all have read the number.
    tl.store(counts + place, number)
    if VALUES == 2:
        total = tl.reshape(tl.join(total, total_of_second), [BLOCK])
    return total


@triton.jit
def _two(first, second):
    """Return the bits of two values of 16 bits as int32."""
    low = first.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (second.to(tl.int16, bitcast=True).to(tl.int32) << 16)
