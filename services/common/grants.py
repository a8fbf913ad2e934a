"""Grants: how a pool's gateways share the room that its backlog has, before any work is done for a call.

A call is *on its way* from where its gateway lets it in until its submit is sent. A gateway that wants to let in more
asks for all that wait, and states how many it has on their way. These, and those that are granted, count beside the
backlog until it states something else, or for LIFE_MS: so what a gateway that died had been granted comes back.

A grant is advice. What the submit's script says counts: it alone knows the backlog's length, and every tenant's limits.
`granted` is done in Redis by store/lua/grant.lua.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from services.common.ids import GatewayId

LIFE_MS = 1_000
"""How long what a gateway states counts, unless it states something else."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A gateway's question."""

    gateway: GatewayId
    num_on_their_way: int
    """What it has let in, and not submitted."""
    num_wanted: int
    """So many more wait."""
    backlog_limit: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What it is told."""

    num_granted: int
    """So many of those that wait may go on."""
    num_taken: int
    """Requests in the backlog, and calls of all gateways that were on their way to it."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What counts of a gateway's calls."""

    num_calls: int
    until_ms: int


def granted(
    ask: Ask, stated: Mapping[GatewayId, Stated], backlog_length: int, now_ms: int
) -> tuple[Grant, dict[GatewayId, Stated]]:
    """The answer, and what counts from now on. `stated`: what did so far. O(gateways)."""
    counting = {gateway: each for gateway, each in stated.items() if each.until_ms > now_ms and gateway != ask.gateway}
    num_taken = backlog_length + ask.num_on_their_way + sum(each.num_calls for each in counting.values())
    num_granted = max(0, min(ask.num_wanted, ask.backlog_limit - num_taken))
    num_calls = ask.num_on_their_way + num_granted
    if num_calls:
        counting[ask.gateway] = Stated(num_calls, now_ms + LIFE_MS)
    return Grant(num_granted, num_taken), counting
