"""Chooses each row's token on the device: the likeliest one, or by noise.

With standard Gumbel noise g, argmax(logits / temperature + g) is a sample of their softmax. The noise is the CPU
runner's, a hash of (seed, choice, index, candidate): see `services.worker.runner.noise`. Bound by the logits' bytes
without noise, by the logarithms in float64 with it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous
from services.worker.kernels.peers import DIFFERENT, Seat, give, note, seat_arguments, slot_of, take
from services.worker.runner.noise import gumbel_noise

_PART = 4096
"""Candidates of a program."""
RANK_WORDS = 4
"""That a rank gives of a row: its best logit, which token that is, and a checksum of the row's hidden state."""

_DIFFERENT = tl.constexpr(DIFFERENT)


@dataclass(frozen=True, slots=True)
class RankPart:
    """A rank's part of the vocabulary, where that is dealt out, and what the ranks' agreement is seen by."""

    first_token: int
    hidden: Tensor
    """[num_rows, hidden_size]: what logits are of. Its bits are the same on all ranks, or they are not of one mind."""
    seat: Seat
    """Of RANK_WORDS"""


@dataclass(frozen=True, slots=True)
class Draws:
    """How rows are drawn that are not greedy."""

    rows: Tensor
    """Rows of the logits: [num_draws] int32"""
    keys: Tensor
    """Of the noise: [num_draws] int64"""
    temperatures: Tensor
    """[num_draws] float32, above 0"""


@dataclass(frozen=True, slots=True)
class PartResults:
    """Room for what parts of rows have for the last step."""

    best: Tensor
    """[num_rows, num_parts] float64"""
    token_ids: Tensor
    """[num_rows, num_parts] int32"""
    largest: Tensor
    """The rows' largest logits: [num_rows] float32"""


def part_results(num_rows: int, vocabulary_size: int, device: torch.device) -> PartResults:
    """Make room for the rows of any step."""
    shape = (num_rows, triton.cdiv(vocabulary_size, _PART))
    return PartResults(
        torch.empty(shape, dtype=torch.float64, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )


def choose_likeliest_reference(logits: Tensor) -> Tensor:
    """Return each row's best token, of equal ones the first: [num_rows] int32."""
    return logits.float().argmax(dim=1).to(torch.int32)


def draw_tokens_reference(logits: Tensor, draws: Draws) -> Tensor:
    """Return a token for each draw: [num_draws] int32."""
    rows = logits[draws.rows.long()].float()
    scores = (rows - rows.amax(dim=1, keepdim=True)) / draws.temperatures[:, None]
    noise = gumbel_noise(draws.keys[:, None], torch.arange(logits.shape[1], device=logits.device))
    return (scores + noise).argmax(dim=1).to(torch.int32)


def choose_likeliest(
    logits: Tensor,
    room: PartResults,
    places: Tensor,
    tokens: Tensor,
    last_tokens: Tensor,
    part: RankPart | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Write each row's best token to `tokens[row]` and to `last_tokens[places[row]]`.

    Fills `room.largest`, which `draw_tokens` wants. A place below 0: the row is computed for nothing. With a `part`,
    logits are a rank's, and what is written is the best of all ranks.
    """
    num_rows, vocabulary_size = logits.shape
    num_parts = triton.cdiv(vocabulary_size, _PART)
    assert num_parts <= room.best.shape[1]
    assert logits.is_contiguous()
    _best_of_parts[(num_rows, num_parts)](
        logits, None, None, None, None, room.best, room.token_ids, vocabulary_size, num_parts,
        PART=_PART, PDL=pdl, launch_pdl=pdl, num_warps=8,
    )  # fmt: skip
    seat = part.seat if part else None
    assert seat is None or (num_rows <= seat.num_places and seat.num_words == RANK_WORDS)
    hidden_size = part.hidden.shape[1] if part else 1
    _best_of_rows[(num_rows,)](
        None, room.best, room.token_ids, room.largest, places, tokens, last_tokens, num_parts,
        part and _bits(part.hidden), hidden_size, part and part.first_token,
        *seat_arguments(seat),
        RANK=seat.rank if seat else 0, WORLD=seat.world_size if seat else 1, WORDS=RANK_WORDS,
        HIDDEN=triton.next_power_of_2(hidden_size),
        BLOCK=triton.next_power_of_2(num_parts), PDL=pdl, launch_pdl=pdl, num_warps=4 if part else 1,
    )  # fmt: skip


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def draw_tokens(
    logits: Tensor, draws: Draws, room: PartResults, places: Tensor, tokens: Tensor, last_tokens: Tensor
) -> None:
    """Overwrite the tokens of rows that are drawn, after `choose_likeliest` of the same logits."""
    num_draws = len(draws.rows)
    num_parts = triton.cdiv(logits.shape[1], _PART)
    assert num_parts <= room.best.shape[1]
    _best_of_parts[(num_draws, num_parts)](
        logits, draws.rows, draws.keys, draws.temperatures, room.largest, room.best, room.token_ids,
        logits.shape[1], num_parts, PART=_PART, PDL=False, num_warps=8,
    )  # fmt: skip
    _best_of_rows[(num_draws,)](
        draws.rows, room.best, room.token_ids, None, places, tokens, last_tokens, num_parts,
        None, 1, None, *seat_arguments(None), RANK=0, WORLD=1, WORDS=RANK_WORDS, HIDDEN=1,
        BLOCK=triton.next_power_of_2(num_parts), PDL=False, num_warps=1,
    )  # fmt: skip


# SplitMix64's constants, as in `services.worker.runner.noise`; as int64.
_INCREMENT = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FACTOR_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_FACTOR_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _shift_right(x, BITS: tl.constexpr):
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _noise(key, token_ids):
    x = (token_ids.to(tl.int64) + 1) * _INCREMENT + key
    x = (x ^ _shift_right(x, 30)) * _FACTOR_1
    x = (x ^ _shift_right(x, 27)) * _FACTOR_2
    x = x ^ _shift_right(x, 31)
    uniform = (_shift_right(x, 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _best_of_parts(
    logits,
    rows,
    keys,
    temperatures,
    largest,
    best,
    token_ids,
    vocabulary_size,
    num_parts,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row or draw, part)."""
    index = tl.program_id(0)
    part = tl.program_id(1)
    candidates = part * PART + tl.arange(0, PART)
    inside = candidates < vocabulary_size
    after_previous(PDL)
    row = index
    if rows is not None:
        row = tl.load(rows + index)
    x = tl.load(logits + row.to(tl.int64) * vocabulary_size + candidates, inside, other=float("-inf")).to(tl.float32)
    if keys is not None:
        x = (x - tl.load(largest + row)) / tl.load(temperatures + index)
        x = x.to(tl.float64) + _noise(tl.load(keys + index), candidates)
        x = tl.where(inside, x, float("-inf"))
    top, place = tl.max(x, axis=0, return_indices=True)
    tl.store(best + index * num_parts + part, top.to(tl.float64))
    tl.store(token_ids + index * num_parts + part, part * PART + place)


@triton.jit
def _best_of_rows(
    rows,
    best,
    token_ids,
    largest,
    places,
    tokens,
    last_tokens,
    num_parts,
    hidden,
    hidden_size,
    first_token,
    addresses,
    counts,
    state,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    index = tl.program_id(0)
    parts = tl.arange(0, BLOCK)
    inside = parts < num_parts
    after_previous(PDL)
    x = tl.load(best + index * num_parts + parts, inside, other=float("-inf"))
    top, part = tl.max(x, axis=0, return_indices=True)
    token = tl.load(token_ids + index * num_parts + part)
    if addresses is not None:
        # A logit's own type is float32 at most: nothing of it is lost.
        top, token = _best_of_ranks(
            top.to(tl.float32), token + first_token, hidden + index.to(tl.int64) * hidden_size, hidden_size, index,
            addresses, counts, state, num_places, RANK, WORLD, WORDS, HIDDEN,
        )  # fmt: skip
    row = index
    if rows is not None:
        row = tl.load(rows + index)
    tl.store(tokens + row, token)
    place = tl.load(places + row)
    if place >= 0:
        tl.store(last_tokens + place, token)
    if largest is not None:
        tl.store(largest + row, top.to(tl.float32))


@triton.jit
def _best_of_ranks(
    top,
    token,
    hidden,
    hidden_size,
    place,
    addresses,
    counts,
    state,
    num_places,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Return the best logit of all ranks and its token; of equal ones the first."""
    columns = tl.arange(0, HIDDEN)
    checksum = tl.sum(tl.load(hidden + columns, columns < hidden_size, other=0).to(tl.int32) * (2 * columns + 1))
    words = tl.arange(0, WORDS)
    everywhere = words >= 0
    bits = top.to(tl.int32, bitcast=True)
    given = tl.where(words == 0, bits, tl.where(words == 1, token, tl.where(words == 2, checksum, 0)))
    number, slot = slot_of(counts, place, num_places, WORDS, WORLD)
    give(given, slot + RANK * WORDS + words, everywhere, number, addresses, RANK, WORLD)
    best = float("-inf")
    chosen = -1
    for rank in tl.static_range(WORLD):
        theirs = given
        if rank != RANK:
            theirs = take(slot + rank * WORDS + words, everywhere, number, addresses, state, RANK)
        logit = tl.sum(tl.where(words == 0, theirs, 0)).to(tl.float32, bitcast=True)
        candidate = tl.sum(tl.where(words == 1, theirs, 0))
        if tl.sum(tl.where(words == 2, theirs, 0)) != checksum:
            note(state, _DIFFERENT)
        # Before the first there is none, whatever its logit is.
        is_better = (logit > best) | (chosen < 0)
        best = tl.where(is_better, logit, best)
        chosen = tl.where(is_better, candidate, chosen)
    tl.store(counts + place, number)
    return best, chosen
