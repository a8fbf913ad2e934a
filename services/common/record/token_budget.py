"""A tenant's tokens a minute, held as one time: when all that it took will have come back.

A budget of N tokens, into which N a minute flow until it is full (a leaky bucket; in this form the generic cell rate
algorithm, ITU-T I.371). So in the t minutes from its first request on, a tenant uses at most N * (1 + t).
"""

MINUTE_MS = 60_000


def taken(back_at_ms: int, now_ms: int, tokens: int, per_minute: int) -> int:
    """When all will have come back, if these tokens are taken too."""
    return max(back_at_ms, now_ms) - (-tokens * MINUTE_MS // per_minute)


def short_ms(back_at_ms: int, now_ms: int) -> int:
    """In what time as much will be there as `taken` has taken; 0 or less: it is."""
    return back_at_ms - now_ms - MINUTE_MS


def given_back(back_at_ms: int, tokens: int, per_minute: int) -> int:
    """When all will have come back, if these tokens, which were taken, have not been used."""
    return back_at_ms - tokens * MINUTE_MS // per_minute
