"""Where ranks meet inside of kernels: each gives its part to all, takes what others gave, and waits only so long.

One process plays rank 0 of two; what rank 1 gives is stored beforehand, as its kernels would.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from services.worker.kernels.choose_token import RANK_WORDS, RankPart, choose_likeliest, part_results
from services.worker.kernels.gemv import gemv_and_give, gemv_reference
from services.worker.kernels.norm import add_rms_norm, add_rms_norm_reference
from services.worker.kernels.peers import BROKEN, DIFFERENT, LOST, MOST_LOOKS, STATE_SIZE, Seat
from services.worker.kernels.rows import FP8, Rows, Scaled
from services.worker.kernels.scale_rows import scale_rows
from services.worker.kernels.share_rows import PART, places_for, share_rows, share_rows_reference
from services.worker.kernels.small_product import ProductTuning, small_product_and_give
from tests.gpu.devices import DEVICE, DTYPES, IS_CUDA, assert_near, random, seeded

RANK, OTHER, WORLD = 0, 1, 2


@dataclass
class Meeting:
    """Rank 0's seat, and the words of both."""

    seat: Seat
    own: Tensor
    """[2 slots, num_places, world_size, num_words] int64"""
    others: Tensor

    @classmethod
    def of(cls, num_places: int, num_words: int, rank: int = RANK) -> "Meeting":
        words = [torch.zeros((2, num_places, WORLD, num_words), dtype=torch.int64, device=DEVICE) for _ in range(WORLD)]
        state = torch.zeros(STATE_SIZE, dtype=torch.int32, device=DEVICE)
        state[MOST_LOOKS] = 3
        addresses = torch.tensor([each.data_ptr() for each in words], device=DEVICE)
        counts = torch.zeros(num_places, dtype=torch.int32, device=DEVICE)
        seat = Seat(rank, WORLD, addresses, counts, num_words, state)
        return cls(seat, words[rank], words[1 - rank])

    def other_gives(self, values: Tensor, number: int) -> None:
        """values: [num_places, num_words], of 4 bytes each, or twice as many of 2."""
        bits = values.view(torch.int32).long() & 0xFFFFFFFF
        self.own[number % 2, : len(bits), 1 - self.seat.rank, : bits.shape[1]] = (number << 32) | bits

    def given(self, num_places: int, number: int) -> Tensor:
        words = self.others[number % 2, :num_places, self.seat.rank]
        assert ((words >> 32) == number).all()
        return words.to(torch.int32)

    @property
    def broken(self) -> int:
        return int(self.seat.state[BROKEN])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_scales", "num_parts"), [(False, 1), (True, 1), (False, 2)])
def test_a_norm_adds_what_all_ranks_give_meeting_after_meeting(
    dtype: torch.dtype, has_scales: bool, num_parts: int
) -> None:
    num_rows, size, generator = 3, 100, seeded(1)
    meeting = Meeting.of(num_rows + 2, Seat.words_of(size, dtype))
    residual = random(generator, num_rows, size, dtype=dtype)
    weight = random(generator, size, dtype=dtype)
    for number in (1, 2, 3):
        product = random(generator, num_rows, size, dtype=dtype)
        if num_parts > 1:
            product = random(generator, num_parts, num_rows, size)
        own = Scaled(product)
        if has_scales:
            own = Scaled(product, random(generator, num_rows).abs(), random(generator, size).abs())
        theirs = random(generator, num_rows, size, dtype=dtype)
        meeting.other_gives(theirs, number)
        both = Scaled(own.dequantized().to(dtype).float() + theirs.float())
        expected_residual, expected = add_rms_norm_reference(both, residual, weight, 1e-5, False)
        out = Rows(torch.full_like(residual, float("nan")))
        add_rms_norm(own, residual, weight, 1e-5, out, meeting.seat)
        assert_near(residual, expected_residual)
        assert_near(out.values, expected.values)
        assert_near(meeting.given(num_rows, number).view(dtype), own.dequantized().to(dtype))
    assert meeting.seat.counts.tolist() == [3] * num_rows + [0] * 2
    assert meeting.broken == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_there_are_places_meet_some_after_the_others(dtype: torch.dtype) -> None:
    num_places, num_rows, size, generator = 3, 5, 64, seeded(1)
    meeting = Meeting.of(num_places, Seat.words_of(size, dtype))
    parts = random(generator, 2, num_rows, size)
    row_scales, channel_scales = random(generator, num_rows).abs(), random(generator, size).abs()
    own = Scaled(parts, row_scales, channel_scales)
    theirs = random(generator, num_rows, size, dtype=dtype)
    meeting.other_gives(theirs[:num_places], 1)
    meeting.other_gives(theirs[num_places:], 2)
    residual, weight = random(generator, num_rows, size, dtype=dtype), random(generator, size, dtype=dtype)
    both = Scaled((parts.sum(dim=0) * row_scales[:, None] * channel_scales).to(dtype).float() + theirs.float())
    expected_residual, expected = add_rms_norm_reference(both, residual, weight, 1e-5, to_fp8=True)
    out = Rows(torch.zeros_like(residual, dtype=FP8), torch.full((num_rows,), float("nan"), device=DEVICE))
    add_rms_norm(own, residual, weight, 1e-5, out, meeting.seat)
    assert_near(residual, expected_residual)
    assert expected.scales is not None
    assert out.scales is not None
    assert_near(out.scales, expected.scales, dtype)
    assert meeting.seat.counts.tolist() == [2, 2, 1]
    assert meeting.broken == 0


def assert_a_norm_takes_what_was_given(out: Tensor, meeting: Meeting, number: int) -> None:
    """What a product has given is what it has itself, and a norm adds the other rank's to it and gives nothing more."""
    num_rows, size = out.shape
    generator = seeded(number)
    assert torch.equal(meeting.given(num_rows, number).view(out.dtype), out)
    meeting.others.zero_()
    theirs = random(generator, num_rows, size, dtype=out.dtype)
    meeting.other_gives(theirs, number)
    residual, weight = random(generator, num_rows, size, dtype=out.dtype), torch.ones(size, device=DEVICE)
    both = Scaled(out.float() + theirs.float())
    expected_residual, expected = add_rms_norm_reference(both, residual, weight, 1e-5, to_fp8=False)
    normed = Rows(torch.full_like(residual, float("nan")))
    add_rms_norm(Scaled(out, is_given=True), residual, weight, 1e-5, normed, meeting.seat)
    assert_near(residual, expected_residual)
    assert_near(normed.values, expected.values)
    assert not meeting.others.any()
    assert meeting.seat.counts[:num_rows].tolist() == [number] * num_rows
    assert meeting.broken == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("weight_dtype", [*DTYPES, FP8])
def test_a_product_of_one_row_is_given_while_it_is_made(weight_dtype: torch.dtype, rank: int) -> None:
    dtype = DTYPES[1] if weight_dtype == FP8 else weight_dtype
    num_outputs, num_inputs = (4096, 7168) if IS_CUDA else (6, 130)
    meeting = Meeting.of(2, Seat.words_of(num_outputs, dtype), rank)
    for number in (1, 2, 3):
        generator = seeded(number)
        row = random(generator, 1, num_inputs, dtype=dtype)
        weight = random(generator, num_outputs, num_inputs, dtype=weight_dtype)
        scales = random(generator, num_outputs).abs() if weight_dtype == FP8 else None
        out = torch.full((1, num_outputs), float("nan"), device=DEVICE).to(dtype)
        gemv_and_give(row, weight, scales, out, meeting.seat)
        assert_near(out, gemv_reference(row, weight, scales))
        assert_a_norm_takes_what_was_given(out, meeting, number)


@pytest.mark.parametrize("num_rows", [1, 16, 33, 90] if IS_CUDA else [1, 3, 65])
@pytest.mark.parametrize("weight_dtype", [DTYPES[1], FP8])
def test_a_product_of_few_rows_is_given_with_its_scales_in(weight_dtype: torch.dtype, num_rows: int) -> None:
    dtype = DTYPES[1]
    num_outputs, num_inputs = (8192, 4096) if IS_CUDA else (128, 256)
    meeting = Meeting.of(num_rows + 1, Seat.words_of(num_outputs, dtype))
    for number in (1, 2, 3):
        generator = seeded(number)
        rows, scales = Rows(random(generator, num_rows, num_inputs, dtype=weight_dtype)), None
        weight = random(generator, num_outputs, num_inputs, dtype=weight_dtype)
        if weight_dtype == FP8:
            rows = Rows(rows.values, random(generator, num_rows).abs())
            scales = random(generator, num_outputs).abs()
        out = torch.full((num_rows, num_outputs), float("nan"), device=DEVICE).to(dtype)
        small_product_and_give(rows, weight, scales, out, ProductTuning(64, 256, 4), meeting.seat, pdl=IS_CUDA)
        product = rows.values.float() @ weight.float().T
        assert_near(out, Scaled(product, rows.scales, scales).dequantized(), torch.bfloat16)
        assert_a_norm_takes_what_was_given(out, meeting, number)


def test_what_another_rank_does_not_give_is_waited_for_only_so_long() -> None:
    meeting = Meeting.of(2, 8)
    residual = torch.zeros((2, 8), device=DEVICE)
    delta, out = Scaled(torch.ones_like(residual)), Rows(torch.empty_like(residual))
    meeting.other_gives(torch.ones((1, 8), device=DEVICE), 1)
    add_rms_norm(delta, residual, torch.ones(8, device=DEVICE), 1e-5, out, meeting.seat)
    assert meeting.broken == LOST


def a_choice(logits: Tensor, hidden: Tensor, meeting: Meeting, first_token: int) -> tuple[list[int], list[int]]:
    num_rows = len(logits)
    places = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    tokens = torch.full((num_rows,), -7, dtype=torch.int32, device=DEVICE)
    last_tokens = torch.full((num_rows,), -7, dtype=torch.int32, device=DEVICE)
    room = part_results(num_rows, 3 * logits.shape[1], DEVICE)
    part = RankPart(first_token, hidden, meeting.seat)
    choose_likeliest(logits, room, places, tokens, last_tokens, part)
    assert tokens.tolist() == last_tokens.tolist()
    return tokens.tolist(), room.largest.tolist()


def checksums(hidden: Tensor) -> Tensor:
    bits = hidden.view(torch.int32 if hidden.element_size() == 4 else torch.int16).to(torch.int64)
    return (bits * (2 * torch.arange(hidden.shape[1], device=DEVICE) + 1)).sum(dim=1).to(torch.int32)


def their_best(logits: list[float], tokens: list[int], hidden: Tensor) -> Tensor:
    """[num_rows, RANK_WORDS] int32"""
    best = torch.tensor(logits, device=DEVICE).view(torch.int32)
    ids = torch.tensor(tokens, dtype=torch.int32, device=DEVICE)
    return torch.stack((best, ids, checksums(hidden), torch.zeros_like(ids)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_best_of_all_ranks_is_chosen_of_equal_ones_the_first(dtype: torch.dtype, rank: int) -> None:
    generator = seeded(2)
    logits, hidden = random(generator, 3, 50, dtype=dtype), random(generator, 3, 20, dtype=dtype)
    logits[:, 30] = 9.0
    first_token = 50 * rank
    meeting = Meeting.of(3, RANK_WORDS, rank)
    meeting.other_gives(their_best([8.0, 9.0, 10.0], [70 - 50 * rank] * 3, hidden), 1)
    own, theirs = 30 + first_token, 70 - 50 * rank
    tokens, largest = a_choice(logits, hidden, meeting, first_token)
    assert tokens == [own, min(own, theirs), theirs]
    assert largest == [9.0, 9.0, 10.0]
    assert torch.equal(meeting.given(3, 1), their_best([9.0] * 3, [own] * 3, hidden))
    assert meeting.broken == 0


def test_ranks_whose_hidden_states_differ_by_a_bit_are_not_of_one_mind() -> None:
    logits, hidden = random(seeded(2), 2, 50), random(seeded(3), 2, 20)
    meeting = Meeting.of(2, RANK_WORDS)
    other = hidden.clone()
    other.view(torch.int32)[1, 7] ^= 1
    meeting.other_gives(their_best([1.0, 1.0], [60, 60], other), 1)
    a_choice(logits, hidden, meeting, 0)
    assert meeting.broken == DIFFERENT


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_dealt_out_unevenly_become_whole(dtype: torch.dtype) -> None:
    num_rows, sizes = 2, [PART + 20, PART + 4]
    own, theirs = (random(seeded(size), num_rows, size, dtype=dtype) for size in sizes)
    meeting = Meeting.of(places_for(num_rows, max(sizes)) + 1, PART)
    given = torch.zeros((num_rows, 2 * PART), device=DEVICE)
    given[:, : sizes[1]] = theirs.float()
    meeting.other_gives(given.view(-1, PART), 1)
    whole = torch.full((num_rows, sum(sizes)), float("nan"), device=DEVICE).to(dtype)
    first_columns = torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32, device=DEVICE)
    share_rows(own, whole, first_columns, max(sizes), meeting.seat)
    assert torch.equal(whole, share_rows_reference([own, theirs]))
    assert meeting.broken == 0


def test_scales_are_multiplied_in() -> None:
    product = Scaled(random(seeded(1), 3, 1500), random(seeded(2), 3), random(seeded(3), 1500))
    expected = product.dequantized()
    scale_rows(product)
    assert_near(product.product, expected)
