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
from services.worker.runner.noise import gumbel_noise

_PART = 4096
"""Candidates of a program."""


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
    logits: Tensor, room: PartResults, places: Tensor, tokens: Tensor, last_tokens: Tensor, *, pdl: bool = False
) -> None:
    """Write each row's best token to `tokens[row]` and to `last_tokens[places[row]]`.

    Fills `room.largest`, which `draw_tokens` wants. A place below 0: the row is computed for nothing.
    """
    num_rows, vocabulary_size = logits.shape
    num_parts = room.best.shape[1]
    assert logits.is_contiguous()
    _best_of_parts[(num_rows, num_parts)](
        logits, None, None, None, None, room.best, room.token_ids, vocabulary_size, num_parts,
        PART=_PART, PDL=pdl, launch_pdl=pdl, num_warps=8,
    )  # fmt: skip
    _best_of_rows[(num_rows,)](
        None, room.best, room.token_ids, room.largest, places, tokens, last_tokens, num_parts,
        BLOCK=triton.next_power_of_2(num_parts), PDL=pdl, launch_pdl=pdl, num_warps=1,
    )  # fmt: skip


def draw_tokens(
    logits: Tensor, draws: Draws, room: PartResults, places: Tensor, tokens: Tensor, last_tokens: Tensor
) -> None:
    """Overwrite the tokens of rows that are drawn, after `choose_likeliest` of the same logits."""
    num_draws = len(draws.rows)
    num_parts = room.best.shape[1]
    _best_of_parts[(num_draws, num_parts)](
        logits, draws.rows, draws.keys, draws.temperatures, room.largest, room.best, room.token_ids,
        logits.shape[1], num_parts, PART=_PART, PDL=False, num_warps=8,
    )  # fmt: skip
    _best_of_rows[(num_draws,)](
        draws.rows, room.best, room.token_ids, None, places, tokens, last_tokens, num_parts,
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
    rows, best, token_ids, largest, places, tokens, last_tokens, num_parts, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    index = tl.program_id(0)
    parts = tl.arange(0, BLOCK)
    inside = parts < num_parts
    after_previous(PDL)
    x = tl.load(best + index * num_parts + parts, inside, other=float("-inf"))
    top, part = tl.max(x, axis=0, return_indices=True)
    token = tl.load(token_ids + index * num_parts + part)
    row = index
    if rows is not None:
        row = tl.load(rows + index)
    tl.store(tokens + row, token)
    place = tl.load(places + row)
    if place >= 0:
        tl.store(last_tokens + place, token)
    if largest is not None:
        tl.store(largest + row, top.to(tl.float32))
