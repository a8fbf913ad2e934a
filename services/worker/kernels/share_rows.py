"""Rows that are dealt out to ranks by columns, made whole on each of them. Bound by the link: 8 bytes a value."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.peers import Seat, give, seat_arguments, slot_of, take

PART = 1024
"""Columns of a program: the words of a place."""


def places_for(num_rows: int, most_columns: int) -> int:
    """Return how many programs meet of so many rows, of which a rank has at most so many columns."""
    return num_rows * -(-most_columns // PART)


def share_rows(own: Tensor, whole: Tensor, first_columns: Tensor, most_columns: int, seat: Seat) -> None:
    """Write what each rank has of rows to `whole`, [num_rows, size], on all of them.

    own: [num_rows, columns of this rank]; first_columns: [world_size + 1] int32, where each rank's begin, and the size;
    most_columns: that a rank has.
    """
    num_rows, num_parts = len(own), triton.cdiv(most_columns, PART)
    assert own.is_contiguous()
    assert whole.is_contiguous()
    assert own.dtype == whole.dtype
    assert places_for(num_rows, most_columns) <= seat.num_places
    assert seat.num_words == PART
    _share_rows[(num_rows, num_parts)](
        own, whole, first_columns, whole.shape[1], num_parts, *seat_arguments(seat),
        RANK=seat.rank, WORLD=seat.world_size, SIZE=PART, num_warps=4,
    )  # fmt: skip


def share_rows_reference(parts: list[Tensor]) -> Tensor:
    """Return the rows of which each rank has a part."""
    return torch.cat(parts, dim=1)


@triton.jit
def _share_rows(
    own,
    whole,
    first_columns,
    num_columns,
    num_parts,
    addresses,
    counts,
    state,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Program (row, part)."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    columns = tl.program_id(1) * SIZE + lanes
    place = row * num_parts + tl.program_id(1)
    number, slot = slot_of(counts, place, num_places, SIZE, WORLD)
    first = tl.load(first_columns + RANK)
    num_own = tl.load(first_columns + RANK + 1) - first
    x = tl.load(own + row * num_own + columns, columns < num_own, other=0.0)
    tl.store(whole + row * num_columns + first + columns, x, columns < num_own)
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    # All words, also those beyond the end: so each has every number.
    everywhere = lanes >= 0
    give(bits, slot + RANK * SIZE + lanes, everywhere, number, addresses, RANK, WORLD)
    for rank in tl.static_range(WORLD):
        if rank != RANK:
            theirs = take(slot + rank * SIZE + lanes, everywhere, number, addresses, state, RANK)
            begin = tl.load(first_columns + rank)
            inside = columns < tl.load(first_columns + rank + 1) - begin
            values = theirs.to(tl.float32, bitcast=True).to(whole.dtype.element_ty)
            tl.store(whole + row * num_columns + begin + columns, values, inside)
    tl.store(counts + place, number)
