"""Tokens a minute: whatever a tenant asks for and gives back, it never uses more than flowed in."""

from hypothesis import given
from hypothesis import strategies as st

from services.common.record.token_budget import MINUTE_MS, given_back, short_ms, taken

requests = st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 5_000), st.floats(0, 1)), max_size=30)


@given(per_minute=st.integers(1, 10_000), asked=requests)
def test_over_any_time_it_uses_at_most_the_first_fill_and_what_flowed_in(
    per_minute: int, asked: list[tuple[int, int, float]]
) -> None:
    now_ms, back_at_ms, used = 0, 0, 0
    for pause_ms, tokens, share in asked:
        now_ms += pause_ms
        after_ms = taken(back_at_ms, now_ms, tokens, per_minute)
        if short_ms(after_ms, now_ms) > 0:
            continue
        unused = int(tokens * share)
        back_at_ms = given_back(after_ms, unused, per_minute)
        used += tokens - unused
        assert used * MINUTE_MS <= per_minute * (MINUTE_MS + now_ms)


@given(per_minute=st.integers(1, 10_000), back_at_ms=st.integers(0, 100_000), tokens=st.integers(0, 10_000))
def test_who_comes_back_when_told_to_is_served(per_minute: int, back_at_ms: int, tokens: int) -> None:
    now_ms = 50_000
    wait_ms = short_ms(taken(back_at_ms, now_ms, tokens, per_minute), now_ms)
    if tokens <= per_minute and wait_ms > 0:
        then_ms = now_ms + wait_ms
        assert short_ms(taken(back_at_ms, then_ms, tokens, per_minute), then_ms) <= 0


def test_a_whole_minutes_tokens_can_be_taken_at_once_and_no_more() -> None:
    assert short_ms(taken(0, 5_000, 700, 700), 5_000) == 0
    assert short_ms(taken(0, 5_000, 701, 700), 5_000) > 0
